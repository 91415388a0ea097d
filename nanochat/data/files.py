"""Corpora of one's own: .txt, .jsonl and .parquet files, read a piece at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from nanochat.data.corpus import BadRows, Corpus, Shard, Split
from nanochat.errors import UserError
from nanochat.paths import safe_name

EXTENSIONS = (".txt", ".jsonl", ".parquet")
_SECTION = 8_192  # bytes of a section of a long text file, at least
_WHOLE = 65_536  # bytes up to which a text file is one document
_VAL_ONE_IN = 20
_TXT_SHARD = "txt"


class Problem(str):
    """Why a row has no usable text."""


class Row(NamedTuple):
    number: int
    value: "str | Problem"
    position: int
    """Bytes of the file read so far (a fair guess for parquet)."""


class FolderCorpus(Corpus):
    """The .txt, .jsonl and .parquet files of a folder and its sub-folders, or one such file.

    Documents: a .txt file (one of more than 64 KiB is cut into sections of about 8,000 bytes
    at blank lines), a line of a .jsonl file, a row of a .parquet file; the text is in the field or
    column `column`. Rows with nothing but white space are left out.

    Split: a hash of (file name, row) sends one document in twenty to val, so it stays the same when
    files are added. In a corpus so small that one split would get nothing, the document with the
    lowest hash is val (the one with the highest is train).
    """

    def __init__(
        self, root: Path, column: str = "text", bad_rows: BadRows = "error", name: str | None = None
    ):
        self.root = root
        self.column = column
        self.bad_rows = bad_rows
        resolved = str(root.resolve())
        if name is None:
            # Folders of the same name must not share a store.
            digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
            name = f"{safe_name(root.resolve().stem)}-{digest}"
        self.name = name if column == "text" else f"{name}-{safe_name(column)}"
        self._files = {path.relative_to(self._base).as_posix(): path for path in self._find()}
        if not self._files:
            raise UserError(
                f"{root} has no {', '.join(EXTENSIONS)} file; put some text in or name another "
                "folder with --corpus"
            )
        self._forced: dict[tuple[str, int], Split] | None = None

    @property
    def _base(self) -> Path:
        return self.root.parent if self.root.is_file() else self.root

    def _find(self) -> list[Path]:
        if self.root.is_file():
            if self.root.suffix not in EXTENSIONS:
                raise UserError(
                    f"{self.root} has the extension '{self.root.suffix}'; expected one of "
                    f"{', '.join(EXTENSIONS)}"
                )
            return [self.root]
        return sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix in EXTENSIONS
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        )

    def shards(self, split: Split) -> list[Shard]:
        """One for each .jsonl and .parquet file, one for all .txt files together."""
        shards = []
        for shard, names in self._groups().items():
            stats = [(name, self._files[name].stat()) for name in names]
            content = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
            text = json.dumps([self.column, _VAL_ONE_IN, _SECTION, _WHOLE, content])
            fingerprint = hashlib.sha256(text.encode()).hexdigest()
            shards.append(Shard(shard, fingerprint, sum(stat.st_size for _, stat in stats)))
        return shards

    def _groups(self) -> dict[str, list[str]]:
        """Shard name -> file names. Thousands of small .txt files are no thousands of shards."""
        texts = [name for name in self._files if name.endswith(".txt")]
        groups = {_TXT_SHARD: texts} if texts else {}
        for name in self._files:
            if not name.endswith(".txt"):
                safe = safe_name(name)
                digest = hashlib.sha256(name.encode()).hexdigest()[:8]
                groups[name if safe == name else f"{safe}-{digest}"] = [name]
        return groups

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        before = 0
        for name in self._groups()[shard]:
            path = self._files[name]
            for row in self._rows(path, partial(self._in, split, name)):
                if isinstance(row.value, Problem):
                    self._skip(f"{path} {_row_name(path, row.number)}", row.value)
                elif row.value.strip():
                    yield row.value, before + row.position
            before += path.stat().st_size

    def _rows(self, path: Path, wanted: Callable[[int], bool]) -> Iterator[Row]:
        if path.suffix == ".parquet":
            return (row for row in read_parquet(path, self.column) if wanted(row.number))
        if path.suffix == ".jsonl":
            return _read_jsonl(path, self.column, wanted)
        return _read_txt(path, wanted)

    def _in(self, split: Split, name: str, row: int) -> bool:
        if self._forced is None:
            self._forced = self._force_splits()
        by_hash: Split = "val" if _split_hash(name, row) % _VAL_ONE_IN == 0 else "train"
        return self._forced.get((name, row), by_hash) == split

    def _force_splits(self) -> dict[tuple[str, int], Split]:
        """Documents whose split is not that of their hash: only where a split would be empty."""
        keys = []
        seen = set()
        for name, path in self._files.items():
            for row in _count_rows(path):
                key = _split_hash(name, row)
                keys.append((key, name, row))
                seen.add(key % _VAL_ONE_IN == 0)
                if len(seen) == 2:  # the usual end, after some twenty documents
                    return {}
        if len(keys) < 2:
            raise UserError(
                f"{self.root} holds {len(keys)} document{'s' * (len(keys) != 1)}, at least 2 are "
                "needed: one to train on, one to validate on; add more text"
            )
        _, name, row = max(keys) if seen == {True} else min(keys)
        return {(name, row): "train" if seen == {True} else "val"}


def _split_hash(name: str, row: int) -> int:
    digest = hashlib.blake2b(f"{name}\n{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _row_name(path: Path, index: int) -> str:
    """How a person finds the row: lines are counted from 1, the rest from 0."""
    if path.suffix == ".jsonl":
        return f"line {index + 1}"
    return f"section {index}" if path.suffix == ".txt" else f"row {index}"


def _count_rows(path: Path) -> Iterator[int]:
    """The indices of a file's rows, without reading more of it than asked for.

    Blank lines of a .jsonl file are no rows: nothing could be read from one.
    """
    if path.suffix == ".parquet":
        yield from range(_open_parquet(path).metadata.num_rows)
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            for index, line in enumerate(file):
                if line.strip():
                    yield index
    else:
        for index, _, _ in _sections(path):
            yield index


def _sections(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(index, bytes, position): the documents of a text file, joined they are the file.

    A section ends at the first blank line after `_SECTION` bytes, at any line end after four times
    as many.
    """
    whole = path.stat().st_size <= _WHOLE
    index = position = size = 0
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            lines.append(line)
            size += len(line)
            position += len(line)
            if not whole and ((size >= _SECTION and not line.strip()) or size >= 4 * _SECTION):
                yield index, b"".join(lines), position
                index, size, lines = index + 1, 0, []
    if lines:
        yield index, b"".join(lines), position


def _read_txt(path: Path, wanted: Callable[[int], bool]) -> Iterator[Row]:
    for index, raw, position in _sections(path):
        if wanted(index):
            yield Row(index, _decoded(raw, index == 0), position)


def _decoded(raw: bytes, first: bool) -> "str | Problem":
    """UTF-8 text, without the byte order mark a file may begin with."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return Problem(
            f"byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file to UTF-8"
        )


def _read_jsonl(path: Path, column: str, wanted: Callable[[int], bool]) -> Iterator[Row]:
    position = 0
    with path.open("rb") as file:
        for index, line in enumerate(file):
            position += len(line)
            if line.strip() and wanted(index):
                yield Row(index, _json_text(line, column, index == 0), position)


def _json_text(line: bytes, column: str, first: bool) -> "str | Problem":
    text = _decoded(line, first)
    if isinstance(text, Problem):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem(f"not valid JSON ({error})")
    if not isinstance(row, dict):
        return Problem(f"{_kind(row)}; expected an object with a field '{column}'")
    if column not in row:
        fields = ", ".join(sorted(row)) or "none"
        return Problem(f"no field '{column}' (there is: {fields}); name another with PATH:FIELD")
    value = row[column]
    if not isinstance(value, str):
        return Problem(f"the field '{column}' is {_kind(value)}; expected text")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if value != value:
        return "NaN"
    return {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(
        type(value), "a number"
    )


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path} is not a complete parquet file ({error}); download or write it again"
        ) from error


def read_parquet(path: Path, column: str) -> Iterator[Row]:
    """The values of a text column, a batch of rows in memory at a time."""
    import pyarrow as pa

    file = _open_parquet(path)
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"{path} has no column '{column}' (it has: {', '.join(schema.names)}); "
            "name the text's column with PATH:COLUMN"
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(test(kind) for test in is_text):
        raise UserError(
            f"{path}: the column '{column}' holds {kind}, not text; "
            "name the text's column with PATH:COLUMN"
        )
    size, total = path.stat().st_size, file.metadata.num_rows
    index = 0
    try:
        for batch in file.iter_batches(batch_size=512, columns=[column]):
            column_values = batch.column(0)
            if pa.types.is_dictionary(column_values.type):
                column_values = column_values.dictionary_decode()
            for value in _values(column_values):
                if value is None:
                    value = Problem(f"the column '{column}' is null; expected text")
                index += 1
                yield Row(index - 1, value, size * index // total)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged after row {index} ({error}); download or write it again"
        ) from error


def _values(column: Any) -> "list[str | Problem | None]":
    try:
        return cast("list[str | Problem | None]", column.to_pylist())
    except UnicodeDecodeError:  # rare: find the row
        return [
            None if not scalar.is_valid else _decoded(scalar.as_buffer().to_pybytes(), False)
            for scalar in column
        ]
