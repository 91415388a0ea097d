"""Downloads from the Hugging Face hub, a mirror of it, or any URL.

`huggingface_hub` speaks to the server. This module adds three things: a download continues where an
earlier process was stopped, several run at once under one progress bar, and a file gets its final
name only after it was verified.
"""

import logging
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import paths
from nanochat.errors import UserError
from nanochat.paths import safe_name
from nanochat.progress import Bar, progress_bar

_ATTEMPTS = 6  # failures in a row without a new byte before giving up
_FIRST_WAIT = 1.0  # seconds before the second attempt; doubled for each further one
_LONGEST_WAIT = 30.0
_CHUNK = 1 << 20  # bytes per write, which are the most that a dropped connection loses
_SHA256 = re.compile(r"[0-9a-f]{64}$")


def _endpoint() -> str | None:
    """URL of a mirror to use instead of the hub; read at each call (the hub's client: once)."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def list_files(repository: str, wanted: Callable[[str], bool]) -> list[str]:
    """List the names of a data set's files for which `wanted` is true, sorted."""
    from huggingface_hub import HfApi

    try:
        files = HfApi(endpoint=_endpoint()).list_repo_files(repository, repo_type="dataset")
    except Exception as error:  # the client's errors differ by version and transport
        raise UserError(f"the files of {repository} cannot be listed: {_line(error)}") from error
    files = sorted(file for file in files if wanted(file))
    if not files:
        raise UserError(
            f"{repository} has no text, .jsonl or .parquet file; choose another data set"
        )
    return files


def fetch_files(
    repository: str, files: list[str], folder: Path, workers: int, url: str | None = None
) -> None:
    """Download `files` into `folder`, `workers` at a time; each appears when it is verified.

    With `url`, there is one file, from that URL, to which the hub's token is not sent. Dropped and
    stalled connections are resumed, with growing pauses. After `_ATTEMPTS` failures in a row
    without a new byte, UserError is raised. The bytes fetched so far are kept under
    `folder/.partial`, and the next call continues from them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # One bar for all files instead of the client's bar and warnings for each.
    logger = logging.getLogger("huggingface_hub")
    level, quiet = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    # The client writes whole chunks only, 10 MB by default. With those, a connection that breaks
    # after every few MB would never make progress.
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    try:
        with progress_bar(f"downloading {repository}", 0) as bar:
            fetcher = _Fetcher(repository, folder, bar, len(files), url)
            with ThreadPoolExecutor(min(workers, len(files))) as pool:
                futures = [pool.submit(fetcher.fetch, file) for file in files]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    fetcher.stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
    finally:
        logger.setLevel(level)
        constants.DOWNLOAD_CHUNK_SIZE = chunk
        if not quiet:
            enable_progress_bars()


class _Stopped(Exception):
    """Raised in a download when another one failed or the user interrupted."""


class _PartFile:
    """A file being downloaded, which counts what is written to it."""

    def __init__(self, file: BinaryIO, bar: Bar, stop: threading.Event):
        self._file = file
        self._bar = bar
        self._stop = stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        self._bar.advance(len(data))
        return self._file.write(data)

    def truncate(self, size: int | None = None) -> int:
        # The server ignored the requested range and sends the file from its beginning.
        position = self._file.tell()
        before = self._file.seek(0, os.SEEK_END)
        self._file.seek(position)
        after = self._file.truncate(size)
        self._bar.advance(after - before)
        return after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Fetcher:
    """Downloads the files of a repository, or the file of a URL; `fetch` runs in many threads."""

    def __init__(self, repository: str, folder: Path, bar: Bar, num_files: int, url: str | None):
        self.repository = repository
        self.url = url
        self.folder = folder
        self.bar = bar
        self.num_files = num_files
        self.stop = threading.Event()
        self._sizes: dict[str, int] = {}

    def fetch(self, file: str) -> None:
        """Download one file; give up after `_ATTEMPTS` attempts in a row without a new byte."""
        target = self.folder / file
        partial = self.folder / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        # A second process that wants the same file waits, and then finds it.
        with paths.lock(target, "downloading it", cancelled=self.stop.is_set):
            while not target.exists() and not self.stop.is_set():
                before = self._fetched(partial, file)
                try:
                    self._attempt(file, target, partial)
                except _Stopped:
                    return
                except Exception as error:  # the client's errors differ by version and transport
                    _raise_if_hopeless(error, self.repository, file)
                    failures = 1 if self._fetched(partial, file) > before else failures + 1
                    if failures >= _ATTEMPTS:
                        mirror = "(HF_ENDPOINT names a mirror, NANOCHAT_HUB_DIR a local copy)"
                        raise UserError(
                            f"{file} of {self.repository} could not be downloaded: {_line(error)}; "
                            "what was fetched is kept: run the same command again later "
                            + (mirror if self.url is None else "")
                        ) from error
                    self.stop.wait(min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))

    def _fetched(self, partial: Path, file: str) -> int:
        return sum(path.stat().st_size for path in partial.glob(f"{safe_name(file)}.*.part"))

    def _attempt(self, file: str, target: Path, partial: Path) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = self.url or hf_hub_url(
            self.repository, file, repo_type="dataset", endpoint=_endpoint()
        )
        token = False if self.url else None  # None: the user's, if there is one
        metadata = get_hf_file_metadata(url, token=token)
        size, etag = metadata.size, metadata.etag or ""
        # The content's tag is part of the name, so bytes of another version are never continued.
        part = partial / f"{safe_name(file)}.{safe_name(etag)[:16]}.part"
        done = part.stat().st_size if part.exists() else 0
        if size is None:  # without a size, a partial file cannot be checked
            part.unlink(missing_ok=True)
            self.bar.advance(-done if file in self._sizes else 0)
            done = 0
        if file not in self._sizes:
            self._sizes[file] = size or 0
            self.bar.advance(done)
            self.bar.resize(sum(self._sizes.values()) / len(self._sizes) * self.num_files)
        if size is None or done < size:
            with part.open("ab") as opened:
                counted = cast(BinaryIO, _PartFile(opened, self.bar, self.stop))
                try:
                    # hf_hub_download would start from zero after an interruption.
                    http_get(
                        url,
                        counted,
                        resume_size=done,
                        headers=build_hf_headers(token=token),
                        expected_size=size,
                    )
                except OSError as error:
                    # A complete response of the wrong length is another file, such as a proxy's
                    # error page. Only a digest could tell whether some of it is usable.
                    if type(error) is OSError and error.errno is None and not _SHA256.match(etag):
                        counted.seek(0)
                        counted.truncate()
                    raise
                finally:
                    opened.flush()
                    os.fsync(opened.fileno())
        problem = _verify(part, size, etag)
        if problem:
            # A file that is too short can be continued; any other damage makes it useless.
            length = part.stat().st_size
            if size is None or length >= size:
                self.bar.advance(-length)
                part.unlink()
            raise OSError(f"{file} arrived damaged: {problem}")
        os.replace(part, target)
        paths.sync_path(target.parent)
        for other in partial.glob(f"{safe_name(file)}.*.part"):
            other.unlink()


def _verify(path: Path, size: int | None, etag: str) -> str:
    """Describe what is wrong with a downloaded file; empty if nothing is."""
    length = path.stat().st_size
    if size is not None and length != size:
        return f"{length} bytes instead of {size}"
    # Large files are tagged with their SHA-256.
    if _SHA256.match(etag) and (digest := paths.file_sha256(path)) != etag:
        return f"its SHA-256 is {digest[:12]}... instead of {etag[:12]}..."
    if ".parquet." in path.name:
        try:
            pq.ParquetFile(path).close()
        except pa.ArrowException as error:
            return f"its parquet footer cannot be read ({error})"
    if ".zip." in path.name:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            return f"it is no zip archive ({error})"
        if damaged is not None:
            return f"{damaged} in it is damaged"
    return ""


def _raise_if_hopeless(error: Exception, repository: str, file: str) -> None:
    """Raise UserError at once for an error that another attempt cannot help."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{file} of {repository} is not here and HF_HUB_OFFLINE forbids downloading it"
        ) from error
    if status is not None and 400 <= status < 500 and status not in (408, 416, 425, 429):
        raise UserError(
            f"{file} of {repository} cannot be downloaded, the server answers {status}: "
            f"{_line(error)}"
        ) from error
    # Errors of this machine, not of the network: no space, no permission, read-only.
    local = (OSError, PermissionError, FileNotFoundError)
    if type(error) in local and getattr(error, "errno", None) is not None:
        raise error


def _line(error: BaseException) -> str:
    """First line of an error's message, or the error's name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
