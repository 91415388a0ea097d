"""Measure the time that a checkpoint takes from a training loop, in milliseconds.

python -m benchmarks.checkpoint --depth 6 [--json out.json]

Three measurements are taken in turn, A B C A B C, with the same model and optimizer. The results
are medians:

- copy: a plain clone of every parameter and of all optimizer state.
- stall: the time that training waits in `CheckpointManager.save`. The writer then works beside the
  next steps. `slowed` is the time by which these are slower than other steps, over the whole save.
  On a CPU, writer and steps share cores; on a GPU, only the launching thread is slowed.
- synchronous: the same save, until it is written.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish, words
from nanochat.checkpoint_manager import CheckpointManager
from nanochat.cli import parse
from nanochat.config import Learning
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import tune_cpu
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import best_dtype, single
from nanochat.train import Batch, train_step


@dataclass(frozen=True)
class Config:
    depth: int = 6
    vocab_size: int = 8192
    context_length: int = 512
    rows: int = 2
    repeats: int = 7
    """Number of rounds that count, after one for warming up."""
    folder: Path | None = None
    """Folder to write to; default: a temporary folder."""
    json: Path | None = None
    """File for the results."""


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(cfg: Config, folder: Path) -> dict[str, Any]:
    runtime = single(dtype=best_dtype(torch.device("cpu")))
    shape = config_from_depth(
        cfg.depth, cfg.vocab_size, head_dim=64, context_length=cfg.context_length
    )
    model = GPT(shape, runtime.dtype).init_weights(0, words(shape.vocab_size))
    optimizer = Optimizer(
        model, parameter_rules(model, Learning(), width=shape.n_embd), muon_dtype=runtime.dtype
    )
    manager = CheckpointManager(folder, runtime, keep_last=1)
    ids = torch.randint(0, cfg.vocab_size, (cfg.rows, cfg.context_length))
    zeros = torch.zeros_like(ids, dtype=torch.int32)
    batch = Batch(ids, ids, zeros + 1.0, zeros)
    saved = 0

    def step() -> None:
        train_step(model, optimizer, [batch], Hypers(1e-6), runtime)

    def copy() -> None:
        state = [p.detach().clone() for p in model.parameters()]
        state += [value.clone() for value in optimizer.state_dict().values()]

    def save() -> None:
        nonlocal saved
        saved += 1
        manager.save(saved, model, optimizer, {"tokenizer_hash": ""})

    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(1e3 * value)

    for repeat in range(cfg.repeats + 1):
        if repeat == 1:  # the first round warms up
            times.clear()
        step()
        note("copy", seconds(copy))
        step()
        note("stall", seconds(save))
        during = []
        while manager.busy:
            during.append(seconds(step))
        manager.wait()
        alone = statistics.median(seconds(step) for _ in range(max(3, len(during))))
        note("step", alone)
        note("slowed", sum(during) - alone * len(during))
        note("steps_beside_a_save", len(during) / 1e3)
        note("synchronous", seconds(lambda: (save(), manager.wait())))
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(times["stall"], times["copy"], strict=True)
    return {
        "depth": cfg.depth,
        "megabytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6,
        "milliseconds": medians,
        "stall_to_copy": statistics.median(stall / copied for stall, copied in pairs),
        "stall_to_synchronous": medians["stall"] / medians["synchronous"],
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def main(cfg: Config) -> dict[str, Any]:
    tune_cpu()
    if cfg.folder is not None:
        result = measure(cfg, cfg.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            result = measure(cfg, Path(temporary) / "run")
    publish(result, cfg.json)
    return result


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
