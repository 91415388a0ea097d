"""What a run would do, without a GPU and before anything starts.

python -m scripts.plan --depth 20 --gpus 8 --gpu h100
python -m scripts.plan --depth 4 --context-length 256 --gpu cpu --num-steps 500
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table

from nanochat.config import BaseConfig
from nanochat.dataset import NAMED
from nanochat.errors import UserError
from nanochat.gpt import config_from_depth
from nanochat.launch import launch
from nanochat.log import PEAK_FLOPS, duration_text
from nanochat.memory import estimate_memory, largest_batch
from nanochat.plan import (
    DEFAULT_RATIO,
    context_schedule,
    make_plan,
)
from nanochat.runtime import DTYPES, Runtime

GPU_MEMORY = {
    "cpu": 0.0, "h100": 80, "h200": 141, "h800": 80, "b200": 180, "a100": 80, "a800": 80,
    "l40s": 48, "l4": 24, "a10": 24, "4090": 24, "3090": 24,
}  # fmt: skip
"""GB per device (vendors' data sheets)."""


@dataclass(frozen=True)
class Config(BaseConfig):
    gpus: int = 8
    """Ranks of the job."""
    gpu: Literal[
        "cpu", "h100", "h200", "h800", "b200", "a100", "a800", "l40s", "l4", "a10", "4090", "3090"
    ] = "h100"
    """Kind of GPU; cpu plans for this machine."""
    gpu_memory: float | None = None
    """GB per device, where it differs from the data sheet."""
    mfu: float = 0.4
    """Share of the peak that the run is expected to reach."""
    price_per_hour: float = 3.0
    """Of one device, for the cost."""
    vocab_size: int = 65536
    """Vocabulary of the tokenizer to come."""
    print: str | None = None
    """Print this one value only (num_shards, num_steps, hours, ...): for shell scripts."""


def main(cfg: Config, runtime: Runtime) -> dict[str, Any]:
    if cfg.gpus < 1:
        raise UserError(f"--gpus {cfg.gpus} must be at least 1")
    device_type = "cpu" if cfg.gpu == "cpu" else "cuda"
    world_size = 1 if device_type == "cpu" else cfg.gpus
    schedule = context_schedule(cfg)
    context_length = schedule[-1][0]
    dtype = runtime.dtype if device_type == "cpu" else torch.bfloat16
    if cfg.run.dtype != "auto":
        dtype = DTYPES[cfg.run.dtype]
    model_config = config_from_depth(
        cfg.depth,
        cfg.vocab_size,
        aspect_ratio=cfg.aspect_ratio,
        head_dim=cfg.head_dim,
        kv_heads=cfg.kv_heads,
        context_length=context_length,
        window_pattern=cfg.window_pattern,
        portable=cfg.portable,
    )
    gigabytes = cfg.gpu_memory or GPU_MEMORY[cfg.gpu]
    limit = int(0.9 * gigabytes * 1e9) if gigabytes else None
    plan = make_plan(
        model_config,
        batching=cfg.batching,
        duration=cfg.duration,
        learning=cfg.learning,
        sequence_length=context_length,
        world_size=world_size,
        device_type=device_type,
        dtype=dtype,
        memory_limit=limit,
        schedule=schedule,
    )
    shape: dict[str, Any] = {
        "sequence_length": context_length,
        "world_size": world_size,
        "dtype": dtype,
        "device_type": device_type,
        "recompute": cfg.batching.recompute,
    }
    memory = estimate_memory(model_config, rows=plan.device_batch_size, **shape)
    # One slot of the decoding cache: a full context in the activation dtype.
    kv_bytes = (
        2 * model_config.n_layer * model_config.n_kv_head * model_config.head_dim
        * context_length * dtype.itemsize
    )  # fmt: skip
    result: dict[str, Any] = {
        **asdict(plan),
        "flops_per_token": round(plan.flops / plan.tokens),
        "memory": memory,
        "kv_cache_per_chat": kv_bytes,
        "largest_device_batch_size": largest_batch(model_config, limit=limit, **shape)
        if limit
        else None,
        "num_shards": _num_shards(cfg, plan.tokens),
        "hours": None,
        "cost": None,
    }
    peaks = {name.lower(): peak for name, peak in PEAK_FLOPS.items()}
    if cfg.gpu in peaks:
        hours = plan.flops / (peaks[cfg.gpu] * world_size * cfg.mfu) / 3600
        result["hours"] = hours
        result["cost"] = hours * world_size * cfg.price_per_hour
    if cfg.print is not None:
        if cfg.print not in result:
            raise UserError(f"--print {cfg.print}: choose one of {', '.join(result)}")
        print(result[cfg.print])
    elif runtime.is_main:
        show(cfg, plan.describe(), result, runtime)
    return result


def _num_shards(cfg: Config, tokens: int) -> int | None:
    """Shards of a named corpus that hold the run's tokens, with a tenth to spare."""
    source = NAMED.get(cfg.corpus)
    if source is None:
        return None
    per_shard = source.total_tokens / source.train_shards
    return min(source.train_shards, max(8, -int(-1.1 * tokens // per_shard)))


def show(cfg: Config, description: str, result: dict[str, Any], runtime: Runtime) -> None:
    runtime.print(description)
    ratio = result["tokens"] / (
        result["parameters"]["block_matrices"] + result["parameters"]["head"]
    )
    runtime.print(
        f"{result['flops_per_token']:,} FLOPs per token; {ratio:.1f} tokens per parameter of "
        f"block matrices and head (default {DEFAULT_RATIO:g})"
    )
    table = Table(title="memory per rank")
    table.add_column("kind")
    table.add_column("GiB", justify="right")
    for kind, size in result["memory"].items():
        table.add_row(kind, f"{size / 2**30:.2f}")
    runtime.console.print(table)
    runtime.print(f"a chat's key/value cache: {result['kv_cache_per_chat'] / 2**20:.1f} MiB")
    if result["largest_device_batch_size"] is not None:
        runtime.print(f"largest device_batch_size that fits: {result['largest_device_batch_size']}")
    if result["num_shards"] is not None:
        runtime.print(f"data: {result['num_shards']} shards of {cfg.corpus}")
    if result["hours"] is not None:
        runtime.print(
            f"expected: {duration_text(3600 * result['hours'])} at {100 * cfg.mfu:.0f} % of the "
            f"peak of {cfg.gpus} x {cfg.gpu}, cost {result['cost']:,.2f} at {cfg.price_per_hour:g} "
            "per device and hour"
        )


if __name__ == "__main__":
    launch(main, Config, __doc__)
