"""Where artifacts live, and how they are written so that a torn one never carries the final name.

Everything lies under `NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def base_dir() -> Path:
    """The folder that holds every artifact; read from the environment at each call."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")


def corpora_dir() -> Path:
    return base_dir() / "corpora"


def tokenizer_dir() -> Path:
    return base_dir() / "tokenizer"


def stores_dir() -> Path:
    return base_dir() / "stores"


def checkpoints_dir(stage: str, tag: str) -> Path:
    return base_dir() / "checkpoints" / stage / tag


def run_dir(stage: str, tag: str) -> Path:
    return base_dir() / "runs" / f"{stage}-{tag}"


def report_dir() -> Path:
    return base_dir() / "report"


def eval_bundle_dir() -> Path:
    return base_dir() / "eval_bundle"


def hub_source(repo_id: str) -> str:
    """What to hand to `datasets.load_dataset`: a folder under `NANOCHAT_HUB_DIR`, or the hub id.

    `NANOCHAT_HUB_DIR/<org>/<name>` is laid out like the data set's repository.
    """
    root = os.environ.get("NANOCHAT_HUB_DIR")
    if root and (Path(root) / repo_id).is_dir():
        return str(Path(root) / repo_id)
    return repo_id


def sync_path(path: Path) -> None:
    """fsync a file, or a folder's entry list where the system allows it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `final` only if the block succeeds.

    Files are synced before the rename, so after a crash or a power cut `final` is either absent,
    the old one, or complete. An existing `final` is replaced. Temporary folders start with a dot
    and end in `.tmp`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync_path(path)
        temporary.chmod(0o755)
        if final.exists():
            # A folder cannot be renamed over a non-empty one: move the old one aside first.
            aside = Path(
                tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent)
            )
            os.replace(final, aside / "old")
            os.replace(temporary, final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, final)
        sync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
