"""Opening and downloading of pretraining corpora.

    open_corpus("bbe")               the embedded corpus (a package, no download)
    open_corpus("climbmix")          the downloaded part of a named corpus on the Hugging Face hub
    open_corpus("./books")           a folder (or one file) of .txt, .md, .jsonl, .json,
                                     .parquet; .gz and .zst too
    open_corpus("./books:content")   the same, with the text in another column
    open_corpus("org/name:content")  a data set of the hub that was downloaded before

    python -m nanochat.data.hub climbmix -n 8     download 8 training shards, 1 for validation
    python -m nanochat.data.hub eval_bundle       download the task files of the CORE metric

A document's split, train or val, never depends on how much was downloaded or on files added later;
see `NamedCorpus`, `FolderCorpus` and `EmbeddedCorpus`.
"""

import argparse
import hashlib
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat import paths
from nanochat.data.corpus import Corpus, EmbeddedCorpus, Shard, Split, bbe_chapters
from nanochat.data.download import fetch_files, list_files
from nanochat.data.files import FolderCorpus, Unusable, kind_of, read_parquet
from nanochat.errors import BadRows, UserError


@dataclass(frozen=True)
class NamedSource:
    """A pretraining corpus on the hub: parquet shards with the text in `column`.

    Its documents were shuffled before they were cut into shards, so the first n shards are a fair
    sample. Training shards have the numbers 0 to `train_shards` - 1. The last shard of the
    repository, number `train_shards`, is the validation split.
    """

    name: str
    repository: str
    train_shards: int
    licence: str
    pattern: str = "shard_{:05d}.parquet"
    column: str = "text"

    def file(self, index: int) -> str:
        return self.pattern.format(index)


SHARD_CHARACTERS = 250_000_000
"""Characters of a shard of the named corpora, about. Their publisher cut them to this size."""
SHARD_BYTES = 100_000_000
"""Bytes of such a shard, compressed, about."""

NAMED = {
    source.name: source
    for source in (
        NamedSource("climbmix", "karpathy/climbmix-400b-shuffle", 6542, "CC BY-NC 4.0"),
        NamedSource("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1822, "ODC-By 1.0"),
    )
}


class NamedCorpus(Corpus):
    """The downloaded part of a `NamedSource`: its training shards before the first missing one.

    Their number alone therefore describes the training data, even during a download.
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
                f"download it with python -m nanochat.data.hub {self.name} -n 8"
            )
        return shards

    def read(self, split: Split, shard: str) -> Iterator[tuple[str, int]]:
        path = self.folder / f"{shard}.parquet"
        for row in read_parquet(path, self.source.column):
            if isinstance(row.value, Unusable):
                self._skip(f"{path} row {row.number}", row.value)
            elif row.value.strip():
                yield row.value, row.position


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _hub_folder(repository: str) -> Path | None:
    """Folder of a repository's local copy under `NANOCHAT_HUB_DIR`, or None."""
    source = Path(paths.hub_source(repository))
    return source if source != Path(repository) and source.is_dir() else None


def _is_data(name: str) -> bool:
    """True if a data set's file holds documents; its README and settings in .json do not."""
    return kind_of(name) is not None and not name.lower().endswith((".md", ".json"))


def _hub_name(repository: str) -> str:
    return repository.replace("/", "--")


def open_corpus(spec: str, bad_rows: BadRows = "error") -> Corpus:
    """Open the corpus that `spec` names (see the top of this module).

    Rows without usable text raise a `UserError` that names file and row. With `bad_rows="skip"`
    they are left out and counted in `Corpus.skipped`.
    """
    if spec == EmbeddedCorpus.name:
        return EmbeddedCorpus()
    if spec in NAMED:
        return NamedCorpus(NAMED[spec], bad_rows)
    place, column = _split_column(str(paths.user_path(spec)) if spec[:1] == "~" else spec)
    if Path(place).exists():
        return FolderCorpus(Path(place), column, bad_rows)
    if _HUB_ID.fullmatch(place):
        folder = _hub_folder(place) or paths.corpora_dir() / _hub_name(place)
        if folder.is_dir():
            return FolderCorpus(folder, column, bad_rows, name=_hub_name(place))
        raise UserError(
            f"there is no folder {place}, and the data set of that name has not been downloaded; "
            f"download it with python -m nanochat.data.hub {place} -n 8"
        )
    raise UserError(
        f"there is no corpus '{spec}': expected bbe, {', '.join(NAMED)}, an existing file or "
        "folder, or ORG/NAME on the hub (with :COLUMN if the text is not in 'text')"
    )


def _split_column(spec: str) -> tuple[str, str]:
    """Split `path:column` into (path, column); a path that exists with its colon is a path."""
    place, colon, column = spec.rpartition(":")
    if not colon or not place or Path(spec).exists() or re.search(r"[/\\]", column):
        return spec, "text"
    if not column:
        raise UserError(f"'{spec}' names no column after the colon; write {place}:COLUMN")
    return place, column


# Downloading


def download(spec: str, num_shards: int, workers: int = 4) -> list[Path]:
    """Download the first `num_shards` training shards of a named corpus, and its validation shard.

    For another data set on the hub, download its first `num_shards` files. Returns the paths, also
    of files downloaded before. A file gets its final name when it is complete and verified: its
    size, its SHA-256 if the server sends one, and the footer of parquet files. An interrupted
    download is continued. `HF_ENDPOINT` names a mirror.
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
        return sorted(path for path in local.rglob("*") if _is_data(path.name))
    if not files:
        files = list_files(repository, _is_data)[:num_shards]

    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        fetch_files(repository, missing, folder, workers)
    return [folder / file for file in files]


BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
_BUNDLE = "eval_bundle"


def fetch_bundle(url: str = BUNDLE_URL) -> Path:
    """Return the folder of the CORE metric's task files; download and unpack them if missing.

    The archive holds core.yaml, eval_meta_data.csv and eval_data/, at its top or in a folder.
    """
    folder = paths.eval_bundle_dir()
    if folder.is_dir():
        return folder
    with paths.lock(folder, "downloading it"):
        if not folder.is_dir():  # another process may have fetched it while this one waited
            _fetch_bundle(url, folder)
    return folder


def _fetch_bundle(url: str, folder: Path) -> None:
    archive = paths.corpora_dir() / f"{_BUNDLE}.zip"
    if not archive.exists():
        try:
            fetch_files(url, [archive.name], archive.parent, 1, url=url)
        except UserError as error:
            raise UserError(
                f"CORE's task files are not in {folder} and cannot be fetched: {error}; put a copy "
                "of the bundle there, or name one with --bundle"
            ) from error
    with (
        zipfile.ZipFile(archive) as opened,
        tempfile.TemporaryDirectory(
            prefix=f".{_BUNDLE}.", suffix=".tmp", dir=folder.parent
        ) as aside,
    ):
        opened.extractall(aside)
        found = sorted(Path(aside).rglob("core.yaml"))
        if not found:
            archive.unlink()
            raise UserError(f"{url} is no bundle of CORE's task files: it has no core.yaml")
        with paths.atomic_folder(folder) as unpacked:
            for path in found[0].parent.iterdir():
                path.rename(unpacked / path.name)
    archive.unlink()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.data.hub",
        description="Download shards of a pretraining corpus, or the CORE metric's task files.",
    )
    parser.add_argument(
        "corpus",
        nargs="?",
        default="climbmix",
        help=f"{', '.join(NAMED)}, ORG/NAME on the hub, or {_BUNDLE}",
    )
    parser.add_argument(
        "-n", "--num-shards", type=int, default=8, help="training shards, from the first on (8)"
    )
    parser.add_argument("--workers", type=int, default=4, help="files downloaded at a time (4)")
    parser.add_argument("--url", default=BUNDLE_URL, help=f"of the {_BUNDLE}")
    arguments = parser.parse_args(argv)
    try:
        if arguments.corpus == _BUNDLE:
            print(f"CORE's task files are in {fetch_bundle(arguments.url)}")
            return
        if arguments.corpus == EmbeddedCorpus.name:
            chapters = len(bbe_chapters())
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
