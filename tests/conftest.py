"""Settings of every test: one thread, no ranks from outside, artifacts in a temporary folder."""

import os
from pathlib import Path

# Before torch is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
REAL_HUB = os.environ.get("NANOCHAT_HUB_DIR")
"""Real data sets, for the tests that ask for them by the fixture."""
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NANOCHAT_HUB_DIR"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Syncing protects against power cuts, which no test causes, and takes seconds on a busy disk. (A
# process that is killed loses nothing it has written.)
os.fsync = lambda descriptor: None  # type: ignore[assignment]


@pytest.fixture(autouse=True, scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test that forgets to set NANOCHAT_BASE_DIR shall not touch the user's artifacts."""
    folder = tmp_path_factory.mktemp("nanochat")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real_hub() -> Path:
    if not REAL_HUB:
        pytest.skip("NANOCHAT_HUB_DIR is not set: no real data sets")
    return Path(REAL_HUB)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a tokenizer and a tiny encoded corpus; copy it, don't write to it."""
    import tiny_runs

    folder = tmp_path_factory.mktemp("encoded")
    tiny_runs.encode_corpus(folder)
    return folder
