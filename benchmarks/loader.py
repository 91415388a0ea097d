"""Measure the data loader alone: rows per second, padding, start-up on a very large store.

    python -m benchmarks.loader --step-ms 300

The result is one JSON object. `--step-ms` is the duration of a training step of `--rows` rows on
this machine (benchmarks/train_step.py measures it); the loader should need less than 1 % of it.
Without `--store` the documents are synthetic, with lengths like web text (log-normal).
"""

import json
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import publish
from nanochat.cli import parse
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import StoreWriter, TokenStore


@dataclass(frozen=True)
class Config:
    step_ms: float = 300.0
    """Duration of a training step of `rows` rows, to compare with."""
    rows: int = 8
    """Rows per micro-batch."""
    sequence_length: int = 512
    """Tokens per row."""
    micro_batches: int = 2000
    """Micro-batches to read."""
    store: Path | None = None
    """Token store to read instead of synthetic documents."""
    documents: int = 20_000
    """Number of synthetic documents."""
    large: int = 10_000_000
    """Number of documents of the store whose start-up is measured."""
    json: Path | None = None
    """File for the result, which is also printed."""


def synthetic_store(folder: Path, documents: int) -> TokenStore:
    """Draw log-normal document lengths: median 400 tokens, mean 640."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(6.0, 0.97, documents).astype(np.int64) + 2
    tokens = random.integers(0, 50_000, int(lengths.max()))
    with StoreWriter(folder, vocab_size=50_000, tokenizer_hash="", fingerprint="") as writer:
        for length in lengths.tolist():
            writer.add(tokens[:length])
    return TokenStore.open(folder)


def large_store(folder: Path, documents: int) -> Path:
    """Make a store whose tokens are a hole in a sparse file; only its offsets are real."""
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(2, 1200, documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / "offsets.npy", offsets)
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(int(offsets[-1]) * 2)
    meta = {
        "version": 1,
        "tokenizer_hash": "",
        "fingerprint": "",
        "num_documents": documents,
        "num_tokens": int(offsets[-1]),
        "has_mask": False,
        "dtype": "uint16",
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def throughput(cfg: Config, store: TokenStore) -> dict[str, float]:
    loader = DataLoader([Source(store)], batch_size=cfg.rows, sequence_length=cfg.sequence_length)
    times, padding = [], 0
    for _ in range(cfg.micro_batches):
        start = time.perf_counter()
        batch = next(loader)
        times.append(time.perf_counter() - start)
        # Padding is the last document of its row; a full row's last document has targets.
        last = batch.doc_ids == batch.doc_ids[:, -1:]
        padding += int((last & ~((batch.targets >= 0) & last).any(1, keepdim=True)).sum())
    mean = statistics.fmean(times)
    return {
        "rows_per_second": cfg.rows / mean,
        "ms_per_micro_batch": mean * 1e3,
        "ms_per_micro_batch_median": statistics.median(times) * 1e3,
        "ms_per_micro_batch_max": max(times) * 1e3,  # one that packs the next window
        "padding_share": padding / (cfg.micro_batches * cfg.rows * cfg.sequence_length),
        "window": loader.window,
        "share_of_step": mean * 1e3 / cfg.step_ms,
    }


def start_up(cfg: Config, folder: Path) -> dict[str, float]:
    tracemalloc.start()
    start = time.perf_counter()
    loader = DataLoader(
        [Source(TokenStore.open(folder))],
        batch_size=cfg.rows,
        sequence_length=cfg.sequence_length,
    )
    next(loader)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"documents": cfg.large, "seconds_to_first_batch": seconds, "peak_heap_bytes": peak}


def main(cfg: Config) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = (
            TokenStore.open(cfg.store)
            if cfg.store
            else synthetic_store(folder / "store", cfg.documents)
        )
        result: dict[str, object] = {
            "rows": cfg.rows,
            "sequence_length": cfg.sequence_length,
            "step_ms": cfg.step_ms,
            "loader": throughput(cfg, store),
            "start_up": start_up(cfg, large_store(folder / "large", cfg.large)),
        }
    publish(result, cfg.json)
    return result


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
