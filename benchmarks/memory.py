"""Compare the plan's memory estimate with the memory of real runs on this CPU.

python -m benchmarks.memory [--json out.json]

Each run is scripts.base_train as a user starts it, in a process of its own, on made-up documents:
steps, an evaluation, a checkpoint during training, samples at the end. The memory is the peak of
the process's resident set, from the run's own log.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import publish
from benchmarks.decode import made_up_tokenizer
from nanochat import memory
from nanochat.cli import parse
from nanochat.config import Learning, from_dict
from nanochat.data.hub import open_corpus
from nanochat.data.store import StoreWriter
from nanochat.gpt import GPTConfig
from nanochat.hardware import Machine
from nanochat.runtime import DTYPES

STEPS = 4


@dataclass(frozen=True)
class Shape:
    depth: int
    rows: int
    context_length: int = 512
    dtype: str = "float32"
    recompute: bool = False
    vocab_size: int = 8192
    micro_batches: int = 1


SHAPES = (
    Shape(2, 4),
    Shape(2, 32),
    Shape(4, 8),
    Shape(4, 8, dtype="bfloat16"),
    Shape(4, 2, 2048),
    Shape(4, 32, 256, micro_batches=2),
    Shape(4, 32, dtype="bfloat16"),
    Shape(4, 32, dtype="bfloat16", recompute=True),
    Shape(6, 1),
    Shape(6, 8),
    Shape(6, 8, recompute=True),
    Shape(6, 16, dtype="bfloat16"),
    Shape(6, 8, vocab_size=32768),
)


@dataclass(frozen=True)
class Config:
    only: int | None = None
    """Number of the only shape to measure."""
    json: Path | None = None
    """File for the results."""


def prepare(folder: Path, vocab_size: int) -> None:
    """Make a tokenizer and a corpus of made-up documents in `folder`."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    tokenizer = made_up_tokenizer(vocab_size)
    tokenizer.save()
    (folder / "text").mkdir()
    (folder / "text" / "text.txt").write_text("a\n\nb")
    corpus = open_corpus(str(folder / "text"))
    draw = np.random.default_rng(0)
    for split, count in (("train", 2000), ("val", 200)):
        with StoreWriter(
            corpus.store_folder(split),  # type: ignore[arg-type]
            vocab_size=vocab_size,
            tokenizer_hash=tokenizer.hash,
            fingerprint="",
        ) as writer:
            for ids in draw.integers(0, vocab_size, (count, 400)):
                writer.add(ids)


def measure(shape: Shape, folder: Path) -> dict[str, Any]:
    """Return the bytes estimated and measured."""
    tokens = shape.rows * shape.context_length
    command = (
        f"-m scripts.base_train --device cpu --dtype {shape.dtype} --depth {shape.depth} "
        f"--head-dim 64 --context-length {shape.context_length} --num-steps {STEPS} "
        f"--device-batch-size {shape.rows} --total-batch-size {tokens * shape.micro_batches} "
        f"--save-every {STEPS - 1} --eval-tokens {tokens} --corpus {folder / 'text'} "
        f"--tag {shape.depth}-{shape.rows}-{shape.context_length}-{shape.dtype}-{shape.recompute}"
    ).split() + ["--recompute"] * shape.recompute
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    logs = sorted((folder / "runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    records = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    peak = dict.fromkeys(("train", "end"), 0)
    for record in records:
        if record["kind"] in peak:
            peak[record["kind"]] = record.get("memory_bytes") or record["peak_memory_bytes"]
    estimate = memory.estimate_memory(
        from_dict(GPTConfig, records[0]["model"]),
        memory.Shape(shape.rows, shape.context_length, shape.recompute),
        Machine("cpu", DTYPES[shape.dtype]),
        Learning(),
    )
    return {
        **vars(shape),
        "measured": peak["end"],
        "measured_in_steps": peak["train"],
        "estimate": estimate,
        "ratio": estimate["total"] / peak["end"],
    }


def main(cfg: Config) -> list[dict[str, Any]]:
    results = []
    before = os.environ.get("NANOCHAT_BASE_DIR")
    try:
        for shape in SHAPES if cfg.only is None else [SHAPES[cfg.only]]:
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder), shape.vocab_size)
                results.append(measure(shape, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    finally:
        if before is None:
            del os.environ["NANOCHAT_BASE_DIR"]
        else:
            os.environ["NANOCHAT_BASE_DIR"] = before
    ratios = [result["ratio"] for result in results]
    print(f"estimate / measured: {min(ratios):.2f} to {max(ratios):.2f}", file=sys.stderr)
    publish(results, cfg.json, quiet=True)
    return results


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
