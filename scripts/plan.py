"""Plan a run: its steps, memory, disk, time and cost. No GPU is needed, and nothing is started.

Examples:
    python -m scripts.plan --depth 20 --gpus 8 --gpu h100
    python -m scripts.plan --depth 4 --context-length 256 --gpu cpu --num-steps 500
    python -m scripts.plan --stage sft --num-steps 800 --gpus 8

The script takes every flag of the stage's own script. Stages after base are planned for the
checkpoint that they start from, or for --depth if there is none yet.
"""

import gc
import math
import shutil
import sys

if __name__ == "__main__":
    gc.disable()  # saves a third of the time for importing torch and its compiler
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from nanochat import paths
from nanochat.checkpoint_manager import find, read_meta, saved_config
from nanochat.cli import launch
from nanochat.config import (
    BaseConfig,
    Batching,
    Duration,
    Learning,
    MidConfig,
    RlConfig,
    SftConfig,
)
from nanochat.data.hub import NAMED, SHARD_BYTES, SHARD_CHARACTERS, NamedCorpus
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig, config_from_depth, extend_context
from nanochat.hardware import GPUS, Machine
from nanochat.memory import (
    LEARNING,
    Shape,
    cache_memory,
    estimate_memory,
)
from nanochat.paths import Stage
from nanochat.plan import (
    DEFAULT_RATIO,
    Plan,
    context_schedule,
    inherited_batching,
    make_plan,
    model_config,
)
from nanochat.progress import duration_text
from nanochat.rl.policy import sampling_memory
from nanochat.rl.start import rollout_batching
from nanochat.runtime import DTYPES, Runtime, single


@dataclass(frozen=True)
class Hardware:
    """Machine to plan for."""

    gpus: int = 8
    """Number of ranks of the job."""
    gpu: Literal[
        "cpu", "h100", "h200", "h800", "gh200", "b200", "mi300x", "a100", "a800", "l40s", "l4",
        "a10", "a10g", "5090", "4090", "3090", "t4", "v100",
    ] = "h100"  # fmt: skip
    """Kind of GPU; cpu plans for this machine."""
    gpu_memory: float | None = None
    """Memory per device in GB, if it differs from the data sheet."""
    mfu: float = 0.4
    """Expected share of the device's peak FLOPs."""
    price_per_hour: float | None = None
    """Price of one device per hour in US dollars; default: a rough one for its kind."""
    vocab_size: int = 65536
    """Vocabulary size, if there is no tokenizer yet."""
    print: str | None = None
    """Print only this value (num_shards, num_steps, hours, ...), for shell scripts."""
    check_disk: bool = False
    """Fail if the disk lacks room for what the run will write."""


@dataclass(frozen=True)
class StartingModel:
    """Model of a later stage whose checkpoint does not exist yet."""

    depth: int = 20
    """Number of layers of the model."""
    trained_context: int = 2048
    """Tokens per row of its pretraining."""


@dataclass(frozen=True)
class StagePlan:
    """Flags of every stage's plan."""

    stage: Stage = "base"
    """Stage whose run to plan; it decides which other flags there are."""
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True)
class LaterPlan(StagePlan):
    """Flags of the plan of a stage after base."""

    model: StartingModel = field(default_factory=StartingModel)


@dataclass(frozen=True)
class Config(BaseConfig, StagePlan):
    pass


@dataclass(frozen=True)
class MidPlan(MidConfig, LaterPlan):
    stage: Stage = "mid"


@dataclass(frozen=True)
class SftPlan(SftConfig, LaterPlan):
    stage: Stage = "sft"


@dataclass(frozen=True)
class RlPlan(RlConfig, LaterPlan):
    stage: Stage = "rl"


CHARACTERS_PER_TOKEN = 4.8
"""Characters of a token of text from the web, with a vocabulary of 65,536; fewer with a smaller
one."""
TASK_BYTES = 6_000_000_000
"""Bytes of the tasks' data sets, as downloaded and as encoded, about."""

AnyPlan = Config | MidPlan | SftPlan | RlPlan
CONFIGS: dict[str, type[AnyPlan]] = {"base": Config, "mid": MidPlan, "sft": SftPlan, "rl": RlPlan}


@dataclass(frozen=True)
class Workload:
    """Plan and memory of a stage."""

    model: GPTConfig
    about_model: str
    batching: Batching
    duration: Duration
    learning: Learning
    other_memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes by phase and kind, in phases that do not need the memory of optimizer steps."""


def model_of(cfg: MidPlan | SftPlan | RlPlan) -> tuple[GPTConfig, str, dict[str, Any]]:
    """Configuration of the model that the stage starts from, its origin in words, its metadata."""
    try:
        folder = find(cfg.source, tag=cfg.run.tag)
    except UserError:
        model = config_from_depth(
            cfg.model.depth, cfg.hardware.vocab_size, context_length=cfg.model.trained_context
        )
        return model, f"no checkpoint of {cfg.source}: planned for --depth {cfg.model.depth}", {}
    meta = read_meta(folder)
    return saved_config(meta, str(folder)), f"the model of {folder}", meta


def job_of(cfg: AnyPlan, world_size: int, dtype: torch.dtype) -> Workload:
    if isinstance(cfg, Config):
        model = model_config(cfg, cfg.hardware.vocab_size)
        return Workload(model, "", cfg.batching, cfg.duration, cfg.learning)
    model, about, source = model_of(cfg)
    if isinstance(cfg, RlPlan):
        if cfg.num_steps is None:
            raise UserError("--stage rl needs --num-steps: an epoch depends on the tasks")
        return Workload(
            model,
            about,
            rollout_batching(cfg, model.context_length, world_size),
            Duration(num_steps=cfg.num_steps),
            cfg.learning,
            sampling_memory(cfg, model, dtype),
        )
    if cfg.context_length is not None:
        model = extend_context(model, cfg.context_length, cfg.rope_scaling)
    if cfg.duration.counts_epochs:
        raise UserError(
            f"--stage {cfg.stage} needs --num-steps or --target-tokens: how long an epoch is "
            "depends on the encoded conversations"
        )
    batching = inherited_batching(cfg.batching, source, model.context_length)
    return Workload(model, about, batching, cfg.duration, cfg.learning)


def main(cfg: AnyPlan, runtime: Runtime) -> dict[str, Any]:
    hardware = cfg.hardware
    if hardware.gpus < 1:
        raise UserError(f"--gpus {hardware.gpus} must be at least 1")
    device_type = "cpu" if hardware.gpu == "cpu" else "cuda"
    world_size = 1 if device_type == "cpu" else hardware.gpus
    dtype = runtime.dtype if device_type == "cpu" else torch.bfloat16
    if cfg.run.dtype != "auto":
        dtype = DTYPES[cfg.run.dtype]
    job = job_of(cfg, world_size, dtype)
    known = {name.lower(): card for name, card in GPUS.items()}.get(hardware.gpu)
    gigabytes = hardware.gpu_memory or (known.gigabytes if known else 0)
    limit = int(0.9 * gigabytes * 1e9) if gigabytes else single().memory_limit()
    machine = Machine(device_type, dtype, world_size, limit)
    plan = make_plan(
        job.model,
        batching=job.batching,
        duration=job.duration,
        learning=job.learning,
        machine=machine,
        schedule=context_schedule(cfg) if isinstance(cfg, Config) else (),
    )
    shape = Shape(plan.device_batch_size, plan.sequence_length, job.batching.recompute)
    memory = estimate_memory(job.model, shape, machine, job.learning)
    total = memory.pop("total")
    always = total - sum(memory.get(kind, 0) for kind in LEARNING)
    for phase, kinds in job.other_memory.items():
        memory |= {f"{phase}: {kind}": size for kind, size in kinds.items()}
        total = max(total, always + sum(kinds.values()))
    shards = _num_shards(cfg, plan.tokens) if isinstance(cfg, Config) else None
    checkpoint = memory["weights"] + world_size * memory["optimizer shard"]
    disk = disk_needed(cfg, checkpoint, shards)
    if hardware.check_disk:
        check_disk(cfg, disk)
    result: dict[str, Any] = {
        "stage": cfg.stage,
        "model": job.about_model,
        **asdict(plan),
        "flops_per_token": round(plan.flops / plan.tokens),
        "memory": {**memory, "total": total},
        "memory_limit": limit,
        "kv_cache_per_chat": cache_memory(job.model, dtype),
        "num_shards": shards,
        "disk": {**disk, "total": sum(disk.values())},
        "hours": None,
        "price": None,
        "cost": None,
    }
    if known:
        hours = plan.flops / (known.peak * world_size * hardware.mfu) / 3600
        price = known.price if hardware.price_per_hour is None else hardware.price_per_hour
        result |= {"hours": hours, "price": price, "cost": hours * world_size * price}
    if hardware.print is not None:
        if hardware.print not in result:
            raise UserError(f"--print {hardware.print}: choose one of {', '.join(result)}")
        print(result[hardware.print])
    elif runtime.is_main:
        show(cfg, plan, result, runtime)
    return result


def _num_shards(cfg: Config, tokens: int) -> int | None:
    """Number of shards of a named corpus that hold the run's tokens, and a tenth more.

    They are counted in characters, since a token's length depends on the tokenizer.

    None for corpora without shards of a known size: a path, bbe, a mixture.
    """
    source = None if cfg.mix else NAMED.get(cfg.corpus)
    if source is None:
        return None
    shards = 1.1 * tokens * CHARACTERS_PER_TOKEN / SHARD_CHARACTERS
    return min(source.train_shards, max(8, math.ceil(shards)))


def disk_needed(cfg: AnyPlan, checkpoint: int, shards: int | None) -> dict[str, int]:
    """Bytes that the run will write, by kind: a base run with all stages after it, or one stage.

    checkpoint: bytes of a checkpoint with its optimizer state. A save is written before the oldest
    one is deleted, so one more than --keep-last exists for a time. Text of unknown size is not
    counted. (Encoding holds the tokens twice for a time, before there are checkpoints.)
    """
    stages = len(paths.STAGES) if cfg.stage == "base" else 1
    needed = {"checkpoints": checkpoint * (stages * (cfg.saving.keep_last or 1) + 1)}
    if cfg.stage == "base" and shards is not None:
        needed["text"] = shards * SHARD_BYTES
        needed["tokens"] = int(2 * shards * SHARD_CHARACTERS / CHARACTERS_PER_TOKEN)
        needed["tasks"] = TASK_BYTES
    return needed


def check_disk(cfg: AnyPlan, needed: dict[str, int]) -> None:
    """Raise UserError if the disk has less room than `needed`, bytes by kind.

    What an earlier start of the same run has written is not needed again.
    """
    stages = paths.STAGES if cfg.stage == "base" else (cfg.stage,)
    written = {"checkpoints": _size(paths.checkpoints_dir(stage, cfg.run.tag) for stage in stages)}
    if isinstance(cfg, Config) and "text" in needed:
        written["text"] = _size([NamedCorpus(NAMED[cfg.corpus]).folder])
        written["tokens"] = _size([paths.stores_dir()])
    missing = sum(max(0, size - written.get(kind, 0)) for kind, size in needed.items())
    base = paths.base_dir()
    existing = next(folder for folder in (base, *base.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        kinds = ", ".join(f"{kind} {size / 1e9:.0f}" for kind, size in needed.items())
        raise UserError(
            f"the run will write about {missing / 1e9:.0f} GB more ({kinds} GB in all), and "
            f"{existing} has {free / 1e9:.0f} GB free: free some space, set NANOCHAT_BASE_DIR to a "
            "folder on a larger disk, or choose a smaller depth or --keep-last 1"
        )


def _size(folders: Iterable[Path]) -> int:
    """Bytes of all files in these folders, which may be missing."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def show(cfg: AnyPlan, plan: Plan, result: dict[str, Any], runtime: Runtime) -> None:
    hardware = cfg.hardware
    if result["model"]:
        runtime.print(result["model"])
    runtime.print(plan.describe())
    scaling = result["parameters"]["block_matrices"] + result["parameters"]["head"]
    runtime.print(
        f"{result['flops_per_token']:,} FLOPs per token; {result['tokens'] / scaling:.1f} tokens "
        f"per parameter of block matrices and head (default {DEFAULT_RATIO:g})"
    )
    table = Table(title="memory per rank")
    table.add_column("kind")
    table.add_column("GiB", justify="right")
    for kind, size in result["memory"].items():
        table.add_row(kind, f"{size / 2**30:.2f}")
    runtime.console.print(table)
    if cfg.stage == "rl":
        runtime.print("learning, rollouts and evaluation take turns: the total is the largest's")
    runtime.print(f"a chat's key/value cache: {result['kv_cache_per_chat'] / 2**20:.1f} MiB")
    if result["memory_limit"]:
        runtime.print(
            f"largest device_batch_size that fits {result['memory_limit'] / 2**30:.1f} GiB: "
            f"{result['largest_device_batch_size']}"
        )
    if result["num_shards"] is not None:
        runtime.print(f"data: {result['num_shards']} shards of {getattr(cfg, 'corpus', '')}")
    kinds = {kind: size for kind, size in result["disk"].items() if kind != "total"}
    runtime.print(
        f"disk: {result['disk']['total'] / 1e9:.0f} GB ("
        + ", ".join(f"{kind} {size / 1e9:.0f}" for kind, size in kinds.items())
        + (", of all stages)" if cfg.stage == "base" else ")")
    )
    if result["hours"] is not None:
        what = "without rollouts, " if cfg.stage == "rl" else ""
        runtime.print(
            f"expected: {what}{duration_text(3600 * result['hours'])} at {100 * hardware.mfu:.0f} %"
            f" of the peak of {hardware.gpus} x {hardware.gpu}, cost {result['cost']:,.2f} at "
            f"{result['price']:g} per device and hour"
        )


def stage_asked_for(argv: list[str]) -> str:
    """Value of --stage, which decides which other flags there are."""
    stage = "base"
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name == "--stage":
            stage = value if equals else following
    return stage


if __name__ == "__main__":
    # The parser reports an unknown stage.
    launch(main, CONFIGS.get(stage_asked_for(sys.argv[1:]), Config), __doc__)
