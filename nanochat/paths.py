"""Folders of all artifacts, locks for writing them, and writing under a temporary name first.

Everything lies under `NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`). Names that people choose
(tags, tokenizers) become folders there, and `checked_name` checks them. A file or folder gets its
final name only when it is complete.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, get_args

from nanochat.errors import UserError

Stage = Literal["base", "mid", "sft", "rl"]
"""The folders of `checkpoints/`: pretraining, mid-training, instruction tuning, reinforcement."""
STAGES: tuple[Stage, ...] = get_args(Stage)

T = TypeVar("T")

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")
"""Names that tempfile makes for `atomic_folder`: `.NAME.xxxxxxxx.tmp`."""
_LOOK_AGAIN = 0.1  # seconds between two tries to get a lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def base_dir() -> Path:
    """Folder of every artifact; read from the environment at each call."""
    return user_path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")


def user_path(path: str | Path) -> Path:
    """Expand the `~` of a path that a user typed; a shell does not do it in `--out=~/x`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be resolved: {error}; write the whole path") from error


def checked_name(name: str, what: str) -> str:
    """Return `name` if it can be a folder's name, else raise a UserError that calls it `what`."""
    if not re.fullmatch(r"\w([^/\\:*?\"<>|\x00-\x1f]{0,98}[^/\\:*?\"<>|\x00-\x1f .])?", name):
        raise UserError(
            f"{what} {name!r} cannot be a folder's name: begin with a letter or digit, and take at "
            'most 100 characters and none of / \\ : * ? " < > |'
        )
    if re.fullmatch(r"step_\d+", name):
        raise UserError(
            f"{what} {name!r} looks like a checkpoint's step folder; choose another name"
        )
    return name


def safe_name(text: str) -> str:
    """Make a folder's name of any text, never an empty one: `./my books` -> `my_books`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".") or "unnamed"


def corpora_dir() -> Path:
    return base_dir() / "corpora"


def tokenizer_dir(name: str = "default") -> Path:
    """Folder of the default tokenizer, or of the tokenizer with this name."""
    if name == "default":
        return base_dir() / "tokenizer"
    return tokenizers_dir() / checked_name(name, "the tokenizer's name")


def tokenizers_dir() -> Path:
    """Folder of the tokenizers with a name, and of present and former default ones by hash."""
    return base_dir() / "tokenizers"


def stores_dir() -> Path:
    return base_dir() / "stores"


def checkpoints_dir(stage: str, tag: str) -> Path:
    return base_dir() / "checkpoints" / stage / checked_name(tag, "--tag")


def run_dir(stage: str, tag: str) -> Path:
    return base_dir() / "runs" / f"{stage}-{checked_name(tag, '--tag')}"


def report_dir(tag: str = "default") -> Path:
    """Folder of measurements and of the report of the tag `default`; other tags have their own."""
    folder = base_dir() / "report"
    return folder if tag == "default" else folder / checked_name(tag, "--tag")


def tok_eval_path(tokenizer: str = "default") -> Path:
    """File of the measurements of the default tokenizer, or of the tokenizer with this name."""
    name = "" if tokenizer == "default" else "-" + checked_name(tokenizer, "the tokenizer's name")
    return report_dir() / f"tok_eval{name}.json"


def eval_bundle_dir() -> Path:
    return base_dir() / "eval_bundle"


def hub_source(repo_id: str) -> str:
    """Path or hub id for `datasets.load_dataset`: the folder under `NANOCHAT_HUB_DIR` if set.

    `NANOCHAT_HUB_DIR/<org>/<name>` must hold the same files as the data set's repository.
    """
    root = os.environ.get("NANOCHAT_HUB_DIR")
    if root and (user_path(root) / repo_id).is_dir():
        return str(user_path(root) / repo_id)
    return repo_id


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def meta_digest(meta: Mapping[str, Any]) -> str:
    """SHA-256 of the metadata of a checkpoint or a store, without its own digest."""
    content = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class HashedFile(io.FileIO):
    """A file that is hashed while it is written, large pieces on another thread.

    `record` is its size and SHA-256 as checkpoints note them, so that nobody has to read it again.
    """

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def record(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def write(self, data: Any, /) -> int:
        """Write all of it, however little the system takes at once (2 GiB on Linux)."""
        whole = rest = memoryview(data).cast("B")
        hashed = in_background(lambda: self._digest.update(whole))
        try:
            while rest:
                rest = rest[super().write(rest) :]
        finally:
            hashed.result()
        self._size += len(whole)
        return len(whole)


def in_background(
    action: Callable[[], T], name: str = "in the background", daemon: bool = False
) -> Future[T]:
    """The future result of an action that a thread of its own begins at once.

    An executor's threads take nothing on any more while the interpreter ends; a checkpoint that is
    being written then still has to become whole. The interpreter does not wait for a `daemon`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=daemon).start()
    return future


def sync_path(path: Path) -> None:
    """Call fsync on a file, or on a folder if the system allows that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(
    artifact: Path,
    doing: str = "writing it",
    *,
    wait: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Lock `artifact`, a file or folder, so that only this process writes it during the block.

    The lock file `.NAME.lock` beside it names the process that holds it, its machine, and what it
    is `doing`. The system frees the lock when that process dies. A second process prints a line to
    stderr and waits; with `wait=False` it gets a UserError at once, and as soon as `cancelled()`
    returns True. The thread that holds a lock may take it again. Temporary files that killed
    writers left beside the artifact are removed.
    """
    artifact = artifact.parent.resolve() / artifact.name
    held: set[Path] = vars(_locks).setdefault("held", set())
    if artifact in held:
        yield
        return
    artifact.parent.mkdir(parents=True, exist_ok=True)
    path = artifact.with_name(f".{artifact.name}.lock")
    told = False
    while (file := _try_lock(path)) is None:
        holder = _holder(path)
        if not wait:
            raise UserError(f"{artifact} is in use by {holder}; wait until that has ended")
        if cancelled():
            raise UserError(f"stopped while waiting for {holder}")
        if not told:
            told = True
            print(f"{artifact} is in use by {holder}: waiting", file=sys.stderr, flush=True)
        time.sleep(_LOOK_AGAIN)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({doing})".encode())
        file.flush()
        held.add(artifact)
        _clean_up(artifact)
        yield
    finally:
        held.discard(artifact)
        # Removed while it is locked, see _try_lock. Windows keeps it: it cannot remove open files.
        with suppress(OSError):
            path.unlink()
        file.close()


_locks = threading.local()


def _try_lock(path: Path) -> BinaryIO | None:
    """Open and lock the file; returns None if another process has locked it."""
    file = path.open("a+b")
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 30)  # locked bytes cannot be read, and others must read the name
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # a file system without locks: go on without one
            file.close()
            return None
    try:
        # The process that held the lock has removed the file, so this lock protects nothing.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        return "another process"


def _clean_up(artifact: Path) -> None:
    """Remove the temporary folders that killed writers left beside an artifact.

    A writer that was killed between its two renames left the former artifact in such a folder; that
    one is renamed back.
    """
    for leftover in list(artifact.parent.glob(".*.tmp")):
        match = _TEMPORARY.fullmatch(leftover.name)
        if not match:
            continue
        final = artifact.with_name(match[1])
        if final == artifact:
            _remove(leftover, final)
        elif leftover.is_dir() and (
            file := _try_lock(path := final.with_name(f".{final.name}.lock"))
        ):
            _remove(leftover, final)
            with suppress(OSError):
                path.unlink()
            file.close()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder; what they had moved aside comes back.

    The caller is the only one who writes anything there.
    """
    for leftover in list(folder.glob(".*.tmp")):
        match = _TEMPORARY.fullmatch(leftover.name)
        _remove(leftover, folder / match[1] if match else leftover)


def _remove(leftover: Path, final: Path) -> None:
    if (leftover / "old").exists() and not final.exists():
        os.replace(leftover / "old", final)
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with suppress(OSError):
            leftover.unlink()


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `final` only if the block succeeds.

    Files are synced before the rename. After a crash or a power cut `final` is therefore absent, or
    the old folder, or the complete new one. An existing `final` is replaced. The lock of `final` is
    held meanwhile. Temporary folders start with a dot and end in `.tmp`.
    """
    with lock(final):
        temporary = _temporary(final)
        try:
            yield temporary
            for path in temporary.rglob("*"):
                sync_path(path)
            temporary.chmod(0o755)
            replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(final: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))


def replace_folder(new: Path, final: Path) -> None:
    """Rename the folder `new` to `final`; an existing `final` is removed, but kept on an error."""
    if final.exists():
        # A folder cannot be renamed over one that has files, so the old one is moved aside first.
        aside = _temporary(final)
        try:
            os.replace(final, aside / "old")
            try:
                os.replace(new, final)
            except BaseException:
                os.replace(aside / "old", final)
                raise
        finally:
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(new, final)
    sync_path(final.parent)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a whole file under a temporary name, sync it and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_path(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
