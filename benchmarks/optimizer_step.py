"""Measure the optimizer's share of a training step, and the bytes that it sends between ranks.

python -m benchmarks.optimizer_step [--json out.json]

Share: the part of a training step (depth 6, width 384, T 512, 8 rows, vocabulary 8,192, 4
micro-batches) that `Optimizer.step` takes, in both dtypes, as medians.

Bytes: the collectives of one optimizer step on 2, 3 and 4 gloo ranks, without and with
--bf16-transfers. In a ring of W ranks, a rank sends (W-1)/W of the tensor for a reduce-scatter, an
all-gather or an all-to-all, and twice that for an all-reduce. The minimum in float32 is a
reduce-scatter of all gradients and an all-gather of all parameters, 2 (W-1)/W of their bytes. The
rest is padding of stacks whose number of matrices is not a multiple of W.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import publish, words
from nanochat import optim
from nanochat.cli import parse
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.hardware import tune_cpu
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import DTYPES, best_dtype, single
from nanochat.train import Batch, train_step


@dataclass(frozen=True)
class Config:
    depth: int = 6
    vocab_size: int = 8192
    context_length: int = 512
    rows: int = 8
    micro_batches: int = 4
    repeats: int = 5
    """Number of steps that count, after one for warming up."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    world_sizes: tuple[int, ...] = (2, 3, 4)
    json: Path | None = None
    """File for the results."""


def model_config(cfg: Config) -> GPTConfig:
    return config_from_depth(
        cfg.depth, cfg.vocab_size, head_dim=64, context_length=cfg.context_length
    )


def share_of_a_step(cfg: Config, dtype: torch.dtype) -> dict[str, float]:
    model = GPT(model_config(cfg), dtype).init_weights(0, words(cfg.vocab_size))
    rules = parameter_rules(model, Learning(), width=model.config.n_embd)
    taken: list[float] = []

    class Timed(Optimizer):
        def step(self, hypers: Hypers) -> None:
            start = time.perf_counter()
            super().step(hypers)
            taken.append(time.perf_counter() - start)

    # Orthogonalisation is in the fastest native dtype, as in the training scripts.
    optimizer = Timed(model, rules, muon_dtype=best_dtype(torch.device("cpu")))
    ids = torch.randint(0, cfg.vocab_size, (cfg.rows, cfg.context_length))
    zeros = torch.zeros_like(ids, dtype=torch.int32)
    batches = [Batch(ids, ids, zeros + 1.0, zeros)] * cfg.micro_batches
    steps = []
    for _ in range(cfg.repeats + 1):
        start = time.perf_counter()
        train_step(model, optimizer, batches, Hypers(1e-6), single(dtype=dtype))
        steps.append(time.perf_counter() - start)
    optimizer_seconds, seconds = statistics.median(taken[1:]), statistics.median(steps[1:])
    return {
        "optimizer_ms": 1e3 * optimizer_seconds,
        "step_ms": 1e3 * seconds,
        "share": optimizer_seconds / seconds,
    }


def count_bytes(rank: int, world_size: int, folder: str, cfg: Config, halved: bool) -> None:
    """Run one rank: a step with counted collectives; rank 0 writes the bytes that it sent."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    sent = 0.0

    def counted(collective: Any, whole: int, times: int) -> Any:
        """Wrap a collective to count bytes. whole: number of the argument with all ranks' data."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal sent
            sent += times * (world_size - 1) / world_size * arguments[whole].nbytes
            return collective(*arguments, **keywords)

        return call

    optim.reduce_scatter = counted(optim.reduce_scatter, 1, 1)
    optim.all_gather = counted(optim.all_gather, 0, 1)
    optim.all_to_all = counted(optim.all_to_all, 1, 1)
    dist.all_reduce = counted(dist.all_reduce, 0, 2)
    model = GPT(model_config(cfg)).init_weights(0, words(cfg.vocab_size))
    parameters = sum(p.numel() for p in model.parameters())
    rules = parameter_rules(model, Learning(bf16_transfers=halved), width=model.config.n_embd)
    Optimizer(model, rules, rank=rank, world_size=world_size).step(Hypers(1e-6))
    if rank == 0:
        least = 2 * (world_size - 1) / world_size * 4 * parameters
        result = {"ranks": world_size, "sent": sent, "least": least, "ratio": sent / least}
        result["bf16_transfers"] = halved
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def communicated(cfg: Config, world_size: int, halved: bool = False) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(count_bytes, (world_size, folder, cfg, halved), nprocs=world_size)  # type: ignore[no-untyped-call]
        result: dict[str, float] = json.loads((Path(folder) / "result").read_text())
    return result


def main(cfg: Config) -> dict[str, Any]:
    tune_cpu()
    result = {
        "share": {name: share_of_a_step(cfg, DTYPES[name]) for name in cfg.dtypes},
        "bytes_per_step": [
            communicated(cfg, world_size, halved)
            for world_size in cfg.world_sizes
            for halved in (False, True)
        ],
        "threads": torch.get_num_threads(),
    }
    publish(result, cfg.json)
    return result


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
