"""Corpora of the user's own files: text, JSON and parquet, read a piece at a time."""

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from nanochat.data.corpus import Corpus, Shard, Split
from nanochat.errors import BadRows, UserError
from nanochat.paths import file_sha256, safe_name

Kind = Literal["text", "lines", "json", "parquet"]
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
}
"""Kind of a file by the end of its name, in lower case. All kinds but parquet may be compressed;
`.gz` or `.zst` then follows."""
_COMPRESSED = (".gz", ".zst")
EXPECTED = f"{', '.join(KINDS)} (all but .parquet also with {' or '.join(_COMPRESSED)})"

_SECTION = 8_192  # smallest size of a section of a long text file, in bytes
_LONGEST = 4 * _SECTION  # bytes after which a section ends at any line end, or inside a line
_WHOLE = 65_536  # largest text file that is one document, in bytes
_HEAD = 1 << 20  # bytes of a .json file that are read to find its layout
_VAL_ONE_IN = 20
_TXT_SHARD = "txt"


class Unusable(str):
    """Reason why a row has no usable text."""


class FileRow(NamedTuple):
    number: int
    value: "str | Unusable"
    position: int
    """Bytes of the file on the disk that were read so far (an estimate for parquet)."""


def kind_of(name: str) -> Kind | None:
    """Kind of the file of this name; None if such files are not read."""
    name = name.lower()
    plain = next((name[: -len(end)] for end in _COMPRESSED if name.endswith(end)), name)
    kind = KINDS.get(os.path.splitext(plain)[1])
    return None if kind == "parquet" and plain != name else kind


class FolderCorpus(Corpus):
    """The text, JSON and parquet files of a folder and its sub-folders, or one such file.

    A document is a text file, a line of a .jsonl file, an object of the list in a .json file (which
    may also hold lines), or a row of a .parquet file. In JSON and parquet, the text is in the field
    or column `column`. A text file of more than 64 KiB, or one that is the only file, is cut into
    several documents: sections of about 8,000 bytes that end at blank lines; very long lines are
    cut at the end of a word. Rows of white space only are left out. Links are followed. Hidden
    files and folders are not read. `notes` lists what else is left out.

    A hash of (file name, row) sends one document in twenty to the split val, so documents keep
    their split when files are added. If one split would be empty, the document with the lowest hash
    goes to val, or the one with the highest to train.
    """

    def __init__(
        self, root: Path, column: str = "text", bad_rows: BadRows = "error", name: str | None = None
    ):
        self.root = root
        self.column = column
        self.bad_rows = bad_rows
        resolved = str(root.resolve())
        if name is None:
            # Folders with the same name must not share a store.
            digest = hashlib.sha256(_name_bytes(resolved)).hexdigest()[:8]
            name = f"{safe_name(root.resolve().stem)}-{digest}"
        self.name = name if column == "text" else f"{name}-{safe_name(column)}"
        self._ignored: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._kinds: dict[str, Kind] = {}
        self._find()
        if not self._files:
            found = f" ({_listed(self._ignored)})" if self._ignored else ""
            raise UserError(
                f"{root} has no file to read{found}: expected {EXPECTED}; put some text in or name "
                "another folder with --corpus"
            )
        self._alone = len(self._files) == 1
        self._forced: dict[tuple[str, int], Split] | None = None

    def _find(self) -> None:
        """Fill `_files` and `_kinds` with the files to read, `_ignored` with reasons for others."""
        if self.root.is_file():
            kind = kind_of(self.root.name)
            if kind is None:
                raise UserError(
                    f"{self.root} has the extension '{self.root.suffix}'; expected one of "
                    f"{EXPECTED}"
                )
            if kind == "json":
                kind = "lines" if _json_layout(self.root, self.column) == "lines" else "json"
            self._files, self._kinds = {self.root.name: self.root}, {self.root.name: kind}
            return
        for path in sorted(self._walk()):
            name = path.relative_to(self.root).as_posix()
            kind = kind_of(name)
            if not path.is_file():
                link = path.is_symlink()
                self._ignored[name] = "no file behind the link" if link else "no regular file"
            elif kind is None:
                self._ignored[name] = "another kind of file"
            elif kind == "json" and (layout := _json_layout(path, self.column)) != "lines":
                if layout != "list":
                    self._ignored[name] = layout
                else:
                    self._files[name], self._kinds[name] = path, "json"
            else:
                self._files[name] = path
                self._kinds[name] = "lines" if kind == "json" else kind
        readme = next((name for name in self._files if name.lower() == "readme.md"), None)
        if readme and set(self._kinds.values()) != {"text"}:
            del self._files[readme], self._kinds[readme]
            self._ignored[readme] = "it describes the data"

    def _walk(self) -> Iterator[Path]:
        """Yield all files but hidden ones; a folder that several links lead to is entered once."""
        seen = {self.root.resolve()}
        for folder, folders, files in os.walk(self.root, followlinks=True, onerror=_raise):
            here = Path(folder)
            for name in sorted(folders):
                target = (here / name).resolve()
                if name.startswith(".") or target in seen:
                    folders.remove(name)
                    if not name.startswith("."):
                        shown = (here / name).relative_to(self.root).as_posix()
                        self._ignored[shown] = "a folder that is read already"
                seen.add(target)
            folders.sort()
            yield from (here / name for name in files if not name.startswith("."))

    def notes(self) -> list[str]:
        """Lines for the user: files read, files ignored and why, and texts with very long lines."""
        count = len(self._files)
        notes = [f"{self.root}: {count} file{'s' * (count != 1)} read"]
        if self._ignored:
            notes[0] += f", {len(self._ignored)} ignored: {_listed(self._ignored)}"
        cuts, returns = {}, {}
        for name, path in self._files.items():
            if self._kinds[name] != "text":
                continue
            if returns_only(_head(path, _WHOLE)):
                returns[name] = "read as line feeds"
            count = 0
            if _may_have_long_lines(path):
                count = sum(section.inside_a_line for section in self._sections(path))
            if count:
                cuts[name] = f"{count} cut{'s' * (count != 1)}"
        if returns:
            notes.append(f"lines end with carriage returns: {_listed(returns)}")
        if cuts:
            notes.append(f"long lines are cut at word ends into documents: {_listed(cuts)}")
        return notes

    def shards(self, split: Split) -> list[Shard]:
        """List the shards: one per JSON or parquet file, one for all text files together."""
        shards = []
        for shard, names in self._groups().items():
            stats = [(name, self._files[name].stat()) for name in names]
            # The digest is of the content: a copy has the same one, an edited file another, even if
            # its size and time are equal.
            content = [
                [n, _digest(self._files[n], s.st_size, s.st_mtime_ns, s.st_ctime_ns)]
                for n, s in stats
            ]
            times = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
            base = [self.column, _VAL_ONE_IN, _SECTION, _WHOLE, times]
            former = hashlib.sha256(json.dumps(base).encode()).hexdigest()
            settings: list[Any] = [self.column, _VAL_ONE_IN, _SECTION, _WHOLE]
            if shard == _TXT_SHARD:
                settings += [_LONGEST, self._alone]
            fingerprint = hashlib.sha256(json.dumps([*settings, content]).encode()).hexdigest()
            size = sum(stat.st_size for _, stat in stats)
            shards.append(Shard(shard, fingerprint, size, former))
        return shards

    def _groups(self) -> dict[str, list[str]]:
        """File names by shard name; all text files are one shard, as there may be thousands."""
        texts = [name for name in self._files if self._kinds[name] == "text"]
        groups = {_TXT_SHARD: texts} if texts else {}
        for name in self._files:
            if self._kinds[name] != "text":
                safe = safe_name(name)
                digest = hashlib.sha256(_name_bytes(name)).hexdigest()[:8]
                groups[name if safe == name else f"{safe}-{digest}"] = [name]
        return groups

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        before = 0
        for name in self._groups()[shard]:
            path = self._files[name]
            for row in self._rows(name, partial(self._in, split, name)):
                if isinstance(row.value, Unusable):
                    self._skip(f"{path} {self._row_name(name, row.number)}", row.value)
                elif row.value.strip():
                    yield row.value, before + row.position
            before += path.stat().st_size

    def _rows(self, name: str, wanted: Callable[[int], bool]) -> Iterator[FileRow]:
        """Yield the wanted rows of a file; blank lines of a .jsonl file are not rows."""
        path, kind = self._files[name], self._kinds[name]
        if kind == "parquet":
            return (row for row in read_parquet(path, self.column) if wanted(row.number))
        if kind == "json":
            return (row for row in _read_json(path, self.column) if wanted(row.number))
        if kind == "lines":
            return _read_lines(path, self.column, wanted)
        return (
            FileRow(section.number, _decoded(section.raw, section.number == 0), section.position)
            for section in self._sections(path)
            if wanted(section.number)
        )

    def _sections(self, path: Path) -> "Iterator[_Section]":
        small = len(_head(path, _WHOLE + 1)) <= _WHOLE
        if small and not self._alone:
            return _sections(path, None)
        return _sections(path, _SECTION if small else _LONGEST)

    def _row_name(self, name: str, index: int) -> str:
        """Name of a row in errors; lines are counted from 1, other rows from 0."""
        kind = self._kinds[name]
        if kind == "lines":
            return f"line {index + 1}"
        return f"section {index}" if kind == "text" else f"row {index}"

    def _in(self, split: Split, name: str, row: int) -> bool:
        if self._forced is None:
            self._forced = self._force_splits()
        by_hash: Split = "val" if _split_hash(name, row) % _VAL_ONE_IN == 0 else "train"
        return self._forced.get((name, row), by_hash) == split

    def _force_splits(self) -> dict[tuple[str, int], Split]:
        """Documents whose split differs from that of their hash, since a split would be empty."""
        keys = []
        seen = set()
        for name in self._files:
            for number, *_ in self._rows(name, lambda _: True):
                key = _split_hash(name, number)
                keys.append((key, name, number))
                seen.add(key % _VAL_ONE_IN == 0)
                if len(seen) == 2:  # both splits have a document, usually after about twenty
                    return {}
        if len(keys) < 2:
            raise UserError(
                f"{self.root} holds {len(keys)} document{'s' * (len(keys) != 1)}, at least 2 are "
                "needed: one to train on, one to validate on; add more text (a text file that is "
                f"all there is becomes several documents from {2 * _SECTION:,} bytes on)"
            )
        _, name, row = max(keys) if seen == {True} else min(keys)
        return {(name, row): "train" if seen == {True} else "val"}


def _name_bytes(name: str) -> bytes:
    """Encode a file's name, which need not be UTF-8 on Linux."""
    return name.encode("utf-8", "surrogateescape")


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable")


def _listed(reasons: dict[str, str], most: int = 5) -> str:
    """List reasons: `a.pdf, b.doc (another kind of file), c.txt (no file behind the link)`."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in list(reasons.items())[:most]:
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return ", ".join(parts + [f"{len(reasons) - most} more"] * (len(reasons) > most))


@lru_cache(maxsize=100_000)
def _digest(path: Path, *state: int) -> str:
    """SHA-256 of a file, computed once for as long as its size and times stay the same."""
    return file_sha256(path)


def _split_hash(name: str, row: int) -> int:
    digest = hashlib.blake2b(_name_bytes(f"{name}\n{row}"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# Bytes


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a file for reading its uncompressed bytes; yields it with a function for the position.

    The function returns the bytes of the file on the disk read so far. Raises UserError if a
    compressed file is cut off or damaged.
    """
    import pyarrow as pa

    name = path.name.lower()
    with path.open("rb", buffering=1 << 17) as raw:
        stream: Any = raw
        if name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)
        elif name.endswith(".zst"):
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
        try:
            yield stream, raw.tell
        except (EOFError, zlib.error, pa.ArrowException, OSError) as error:
            if stream is raw:
                raise
            raise UserError(
                f"{path} is not a complete compressed file ({error}); download or write it again"
            ) from error


def _head(path: Path, size: int) -> bytes:
    with opened(path) as (stream, _):
        return stream.read(size)


def returns_only(head: bytes) -> bool:
    """True if a file that begins with `head` ends its lines with carriage returns alone."""
    return b"\r" in head[:-1] and b"\n" not in head


def _line_reader(path: Path, stream: BinaryIO) -> Callable[[int], bytes]:
    """Return the stream's `readline`; in a file with only carriage returns, they end lines."""
    if not returns_only(_head(path, _WHOLE)):
        return stream.readline
    text = io.TextIOWrapper(stream, "latin-1", newline=None)  # any byte is a character of latin-1
    return lambda limit: text.readline(limit).encode("latin-1")


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield (index, line, position) of each line of a file."""
    with opened(path) as (stream, position):
        readline = _line_reader(path, stream)
        for index, line in enumerate(iter(lambda: readline(-1), b"")):
            yield index, line, position()


class _Section(NamedTuple):
    """A document of a text file. All sections of a file, joined, are the file."""

    number: int
    raw: bytes
    position: int
    inside_a_line: bool
    """True if the section ends in the middle of a line."""


def _sections(path: Path, longest: int | None) -> Iterator[_Section]:
    """Yield the sections of a text file; with `longest` None, the whole file is one.

    A section ends at the first blank line after `_SECTION` bytes, or at the first line end after
    `longest` bytes. In a line longer than `longest` bytes it ends at the last end of a word.
    """
    ends = _SECTION if longest else _WHOLE + 1
    longest = longest or _WHOLE + 1
    index = size = 0
    lines: list[bytes] = []
    rest = b""
    with opened(path) as (stream, position):
        readline = _line_reader(path, stream)
        while line := rest + readline(longest - len(rest)) if rest else readline(longest):
            inside = len(line) >= longest and line[-1:] != b"\n"
            rest = b""
            if inside:
                end = _word_end(line)
                line, rest = line[:end], line[end:]
            lines.append(line)
            size += len(line)
            if inside or (size >= ends and (size >= longest or not line.strip())):
                yield _Section(index, b"".join(lines), position(), inside)
                index, size, lines = index + 1, 0, []
        if lines:
            yield _Section(index, b"".join(lines), position(), False)


def _may_have_long_lines(path: Path) -> bool:
    """True if a line may have `_SECTION` bytes; thirty times as fast as reading all lines."""
    with opened(path) as (stream, _):
        while block := stream.read(_SECTION // 2):
            if b"\n" not in block:
                return True
    return False


_ENDS = [b" ", b"\t", b"\r", *(end.encode() for end in "\u3000\u3002\uff01\uff1f\uff0c\u3001")]


def _word_end(line: bytes) -> int:
    """Find where to cut a line: after the last space or East Asian mark, or between characters."""
    end = max(line.rfind(mark) + len(mark) if mark in line else 0 for mark in _ENDS)
    if end == 0:
        end = len(line)
        # A UTF-8 character is a first byte and up to three continuing bytes.
        for back in range(1, min(4, end - 1) + 1):
            first = line[-back]
            if first & 0xC0 != 0x80:
                needed = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
                return end if back >= needed else end - back
    return end


def _decoded(raw: bytes, first: bool) -> "str | Unusable":
    """Decode UTF-8; `first` removes the byte order mark that a file may begin with."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return Unusable(
            f"byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file to UTF-8"
        )


def parse_json(line: bytes, first: bool = False) -> Any:
    """Parse UTF-8 JSON; UserError tells whether the encoding or the JSON is wrong.

    `first` allows a byte order mark at the beginning.
    """
    text = _decoded(line, first)
    if isinstance(text, Unusable):
        raise UserError(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from None


# JSON


def _read_lines(path: Path, column: str, wanted: Callable[[int], bool]) -> Iterator[FileRow]:
    for index, line, position in _lines(path):
        if line.strip() and wanted(index):
            try:
                value = _field(parse_json(line, index == 0), column)
            except UserError as error:
                value = Unusable(error)
            yield FileRow(index, value, position)


def _read_json(path: Path, column: str) -> Iterator[FileRow]:
    """Yield the objects of the list in a .json file; the whole list is in memory."""
    with opened(path) as (stream, _):
        data = stream.read()
    size = path.stat().st_size
    try:
        rows = parse_json(data, first=True)
    except UserError as error:
        yield FileRow(0, Unusable(error), size)
        return
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield FileRow(index, _field(row, column), size * (index + 1) // max(1, len(rows)))


def _json_layout(path: Path, column: str) -> str:
    """Return "list" or "lines" (of objects with the field `column`), or why there are no rows."""
    text = _head(path, _HEAD).decode("utf-8-sig", errors="replace").lstrip()
    layout = "list" if text.startswith("[") else "lines"
    first = text[1:].lstrip() if layout == "list" else text
    try:
        row, end = json.JSONDecoder().raw_decode(first)
    except RecursionError:
        return "no list of objects"
    except ValueError:  # the list is longer than the head, or reading it will report the mistake
        return layout if first.startswith("{") else "no list of objects"
    if layout == "lines" and "\n" in first[:end].strip():
        return "one object over several lines"
    if not isinstance(row, dict):
        return "no list of objects"
    return layout if column in row else f"no field '{column}'"


def _field(row: object, column: str) -> "str | Unusable":
    if not isinstance(row, dict):
        return Unusable(f"{_kind(row)}; expected an object with a field '{column}'")
    if column not in row:
        fields = ", ".join(sorted(row)) or "none"
        return Unusable(f"no field '{column}' (there is: {fields}); name another with PATH:FIELD")
    value = row[column]
    if not isinstance(value, str):
        return Unusable(f"the field '{column}' is {_kind(value)}; expected text")
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


def read_parquet(path: Path, column: str) -> Iterator[FileRow]:
    """Yield the values of a text column; only a batch of rows is in memory at a time."""
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
                    value = Unusable(f"the column '{column}' is null; expected text")
                index += 1
                yield FileRow(index - 1, value, size * index // total)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged after row {index} ({error}); download or write it again"
        ) from error


def _values(column: Any) -> "list[str | Unusable | None]":
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # rare: find the row
        return [
            None if not scalar.is_valid else _decoded(scalar.as_buffer().to_pybytes(), False)
            for scalar in column
        ]
