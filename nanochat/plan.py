"""Plan of a run, made before its first step: tokens, steps, batch size, learning rates, memory.

Scaling rules compute these from `--depth`; each has a flag that overrides it. The rules start from
a reference model: depth 12, with 2^19 tokens per step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from nanochat.config import BaseConfig, Batching, Duration, Learning
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig, config_from_depth
from nanochat.hardware import Machine
from nanochat.memory import largest_batch, meta_model
from nanochat.optim import Hypers

REFERENCE_BATCH = 2**19
REFERENCE_DECAY = 0.2
DEFAULT_RATIO = 12.0
MINIMAL_LR_SCALE = 1.0
"""Lower bound of the factor on learning rates. The square-root rule was fitted at large batches and
gives too little for small ones: with 4,096 tokens a step (where it gives 0.09) a depth-4 model
reached 1.354, 1.252 and 1.144 bits per byte after 200 steps with factors of 0.1, 0.3 and 1."""
CPU_TOKENS = 4096
"""Tokens per micro-batch on a CPU: large enough for its matmuls, small enough for its caches."""


@dataclass(frozen=True)
class Phase:
    """Steps from `first_step` on with rows of one length; all phases have the same step size."""

    first_step: int
    sequence_length: int
    device_batch_size: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one training run."""

    num_steps: int
    total_batch_size: int
    """Tokens per optimizer step, over all ranks and micro-batches."""
    device_batch_size: int
    """Rows per rank and micro-batch."""
    largest_device_batch_size: int
    """Largest power of two of rows that fits the memory limit."""
    micro_batches: int
    sequence_length: int
    world_size: int
    tokens: int
    flops: float
    lr_scale: float
    weight_decay: float
    learning: Learning
    parameters: dict[str, int]
    phases: tuple[Phase, ...] = ()
    """Phases of --context-schedule; `sequence_length` and `device_batch_size` are the last's."""

    def phase(self, step: int) -> Phase:
        """Phase that a step belongs to."""
        begun = [phase for phase in self.phases if phase.first_step <= step]
        return begun[-1] if begun else Phase(0, self.sequence_length, self.device_batch_size)

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.sequence_length

    def rows_at(self, step: int) -> int:
        """Number of rows in a step, over all ranks."""
        return self.total_batch_size // self.phase(step).sequence_length

    def hypers(self, step: int) -> Hypers:
        """Values of the schedule at a step in [0, num_steps)."""
        learning = self.learning
        low, high = learning.muon_momentum
        return Hypers(
            lr_multiplier=lr_multiplier(
                step,
                self.num_steps,
                warmup=learning.warmup,
                warmdown=learning.warmdown,
                final=learning.final_lr,
            ),
            momentum=muon_momentum(step, self.num_steps, low=low, high=high),
        )

    def describe(self) -> str:
        """Describe the plan in one paragraph for the console."""
        parts = ", ".join(f"{k} {v:,}" for k, v in self.parameters.items() if v)
        phases = ", then ".join(
            f"{phase.device_batch_size} rows x {phase.sequence_length} tokens from step "
            f"{phase.first_step}"
            for phase in self.phases
        )
        rows = phases or f"{self.device_batch_size} rows x {self.sequence_length} tokens"
        return (
            f"{sum(self.parameters.values()):,} parameters ({parts})\n"
            f"{self.num_steps:,} steps x {self.total_batch_size:,} tokens = {self.tokens:,} tokens"
            f", {self.flops:.2e} FLOPs; step = {rows} x {self.micro_batches} micro-batches x "
            f"{self.world_size} ranks; lr scale {self.lr_scale:.3f}, "
            f"weight decay {self.weight_decay:.4f}"
        )


def scaled_batch_size(tokens: float, reference_tokens: float) -> int:
    """Tokens per step: 2^19 (D / D12)^0.383 (arXiv 2505.13738), rounded to a power of two."""
    return int(2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383)))


def scaled_lr(total_batch_size: int) -> float:
    """Factor on every learning rate: sqrt(B / 2^19), but at least MINIMAL_LR_SCALE."""
    return float(max(MINIMAL_LR_SCALE, math.sqrt(total_batch_size / REFERENCE_BATCH)))


def scaled_weight_decay(
    total_batch_size: int, lr: float, lr_scale: float, tokens: float, reference_tokens: float
) -> float:
    """Weight decay with which every run forgets the same fraction of a weight (arXiv 2405.13698).

    lambda = lambda12 (B / B12) (D12 / D) / lr_scale; with the square-root rule for lr_scale this is
    lambda12 sqrt(B / B12) D12 / D. The result is bounded so that a step never takes more than 2 %
    of a weight; the formula alone would take more than 100 % in a run of a few steps.
    """
    if lr * lr_scale == 0:  # frozen matrices
        return 0.0
    share = total_batch_size / REFERENCE_BATCH * reference_tokens / tokens
    return float(min(REFERENCE_DECAY * share / lr_scale, 0.02 / (lr * lr_scale)))


def inherited_batching(
    batching: Batching, source: Mapping[str, Any], sequence_length: int
) -> Batching:
    """Set a step size of `auto` to that of the run that this one starts from.

    source: metadata of its checkpoint. A run that chose small steps is thus followed by one with
    small steps. The size is rounded down to whole rows, whatever the number of ranks.
    The rule applies if the size is not recorded, or belongs to rollouts, which set their own.
    """
    total = source.get("total_batch_size")
    if batching.total_batch_size != "auto" or total is None or source["stage"] == "rl":
        return batching
    rows = max(1, total // sequence_length)
    return replace(batching, total_batch_size=rows * sequence_length)


def context_schedule(cfg: BaseConfig) -> list[tuple[int, Fraction]]:
    """List (row length, share of the steps) of each phase; the last length is the context length.

    `--context-schedule 256:0.5,512:0.5` gives two phases; without the flag there is one. Each
    length must divide the last one, so that every step has the same number of tokens; UserError
    otherwise.
    """
    if cfg.context_schedule is None:
        return [(cfg.context_length, Fraction(1))]
    schedule: list[tuple[int, Fraction]] = []
    for part in cfg.context_schedule.split(","):
        length, _, share = part.partition(":")
        try:
            schedule.append((int(length), Fraction(share)))
        except (ValueError, ZeroDivisionError):
            schedule.append((0, Fraction(0)))
        if schedule[-1][0] < 1 or schedule[-1][1] <= 0:
            raise UserError(
                f"--context-schedule {part!r}: write a length and its share of the steps, "
                "like 256:0.5,512:0.5"
            )
    lengths, shares = zip(*schedule, strict=True)
    if sum(shares) != 1:
        raise UserError(
            f"--context-schedule {cfg.context_schedule}: the shares add up to "
            f"{float(sum(shares)):g}, they must to 1"
        )
    if list(lengths) != sorted(set(lengths)) or any(lengths[-1] % length for length in lengths):
        raise UserError(
            f"--context-schedule {cfg.context_schedule}: lengths must rise, and each must divide "
            f"the last one, {lengths[-1]}, so that every step has the same number of tokens"
        )
    return schedule


def model_config(cfg: BaseConfig, vocab_size: int) -> GPTConfig:
    """Build the model configuration that the flags of pretraining describe."""
    return config_from_depth(
        cfg.depth,
        vocab_size,
        aspect_ratio=cfg.aspect_ratio,
        head_dim=cfg.head_dim,
        kv_heads=cfg.kv_heads,
        context_length=context_schedule(cfg)[-1][0],
        window_pattern=cfg.window_pattern,
        portable=cfg.portable,
    )


def make_plan(
    config: GPTConfig,
    *,
    batching: Batching,
    duration: Duration,
    learning: Learning,
    machine: Machine,
    rows_in_epochs: Callable[[int], int] | None = None,
    schedule: Sequence[tuple[int, Fraction]] = (),
) -> Plan:
    """Resolve every "auto" and count the steps.

    rows_in_epochs(n) is the number of rows in n epochs (for --epochs and --max-epochs; without it,
    as there is no data yet, --max-epochs counts for nothing). schedule is the result of
    `context_schedule`; it ends with the model's context length. Raises UserError if batch sizes do
    not divide or not even one row fits into memory.
    """
    sequence_length, world_size = config.context_length, machine.world_size
    schedule = schedule or [(sequence_length, Fraction(1))]
    for flag, passes in (
        ("epochs", duration.epochs if duration.counts_epochs else None),
        ("max-epochs", duration.max_epochs),
    ):
        if passes is not None and passes < 1:
            raise UserError(f"--{flag} {passes} must be at least 1")
        if passes is not None and len(schedule) > 1:
            raise UserError(
                f"--{flag} {passes} with a --context-schedule: how many rows an epoch has "
                "depends on their length; give --num-steps or --target-tokens instead"
            )
    model = meta_model(config)
    parameters = model.num_parameters()
    scaling = parameters["block_matrices"] + parameters["head"]
    reference = meta_model(config_from_depth(12, config.vocab_size)).num_parameters()
    reference_tokens = DEFAULT_RATIO * (reference["block_matrices"] + reference["head"])
    flops_per_token = float(
        sum(share * model.flops_per_token(length) for length, share in schedule)
    )

    tokens = _token_budget(duration, scaling, flops_per_token)
    total = batching.total_batch_size
    largest = largest_batch(config, machine, sequence_length, learning, batching.recompute)
    if largest == 0 and batching.device_batch_size == "auto":
        raise UserError(
            f"not even one row of {sequence_length} tokens fits into "
            f"{(machine.memory_limit or 0) / 2**30:.1f} GiB; use --recompute, a smaller --depth or "
            "a shorter --context-length"
        )
    fits = largest
    if machine.device_type == "cpu":
        fits = min(fits, max(1, CPU_TOKENS // sequence_length))
    rows, micro_batches, total = _batch(
        batching.device_batch_size,
        scaled_batch_size(tokens or DEFAULT_RATIO * scaling, reference_tokens)
        if total == "auto"
        else total,
        total == "auto",
        sequence_length,
        world_size,
        fits,
    )
    if duration.num_steps is not None:
        num_steps = duration.num_steps
    elif duration.counts_epochs and duration.epochs is not None:
        if rows_in_epochs is None:
            raise UserError("--epochs needs the encoded data; use --num-steps here")
        num_steps = math.ceil(rows_in_epochs(duration.epochs) * sequence_length / total)
    else:
        num_steps = max(1, round((tokens or 0) / total))
    if num_steps < 1:
        raise UserError(f"--num-steps {num_steps} must be at least 1")
    if duration.max_epochs is not None and rows_in_epochs is not None:
        rows_at_most = rows_in_epochs(duration.max_epochs)
        num_steps = min(num_steps, math.ceil(rows_at_most * sequence_length / total))
    lr_scale = scaled_lr(total) if learning.lr_scale == "auto" else learning.lr_scale
    weight_decay = (
        scaled_weight_decay(
            total, learning.matrix_lr, lr_scale, num_steps * total, reference_tokens
        )
        if learning.weight_decay == "auto"
        else learning.weight_decay
    )
    phases: list[Phase] = []
    done = Fraction(0)
    for length, share in schedule:
        phases.append(Phase(round(done * num_steps), length, rows * sequence_length // length))
        done += share
    return Plan(
        num_steps=num_steps,
        total_batch_size=total,
        device_batch_size=rows,
        largest_device_batch_size=largest,
        micro_batches=micro_batches,
        sequence_length=sequence_length,
        world_size=world_size,
        tokens=num_steps * total,
        flops=flops_per_token * num_steps * total,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        learning=learning,
        parameters=parameters,
        phases=tuple(phases) if len(phases) > 1 else (),
    )


def _token_budget(duration: Duration, scaling: int, flops_per_token: float) -> float | None:
    """Number of tokens to train on; None if the duration is given in steps or epochs."""
    if duration.num_steps is not None or duration.counts_epochs:
        return None
    if duration.target_tokens is not None:
        tokens = float(duration.target_tokens)
    elif duration.target_flops is not None:
        tokens = duration.target_flops / flops_per_token
    else:
        ratio = duration.target_param_data_ratio
        tokens = (DEFAULT_RATIO if ratio is None else ratio) * scaling
    if tokens <= 0:
        raise UserError(f"a budget of {tokens:,.0f} tokens trains nothing; it must be positive")
    return tokens


def _batch(
    rows: str | int,
    total: int,
    total_is_auto: bool,
    T: int,
    world_size: int,
    fits: int,
) -> tuple[int, int, int]:
    """Compute rows per micro-batch, micro-batches per step, and tokens per step.

    If the rows do not divide evenly, some ranks have empty rows.
    """
    if isinstance(rows, int) and rows < 1:
        raise UserError(f"--device-batch-size {rows} must be at least 1")
    if total_is_auto:
        per_row = T * world_size
        total = max(1, total // per_row) * per_row
    if total < T or total % T:
        raise UserError(
            f"total_batch_size {total} must be a multiple of {T} (a row of {T} tokens); "
            f"try {max(1, round(total / T)) * T}"
        )
    rows_per_rank = -(-(total // T) // world_size)
    if isinstance(rows, str):
        rows = max(r for r in range(1, min(fits, rows_per_rank) + 1) if rows_per_rank % r == 0)
    if total_is_auto and rows_per_rank % rows:
        rows_per_rank = max(1, rows_per_rank // rows) * rows
        total = rows_per_rank * T * world_size
    return rows, -(-rows_per_rank // rows), total


def lr_multiplier(
    step: int, num_steps: int, *, warmup: float, warmdown: float, final: float = 0.0
) -> float:
    """Factor on every learning rate at `step` in [0, num_steps): warm-up, hold, warm-down.

    `warmup` and `warmdown` are fractions of num_steps. The warm-down is linear and would reach
    `final` one step after the last. The factor is never negative, and not 0 at the first step.

    >>> [lr_multiplier(s, 4, warmup=0.25, warmdown=0.5) for s in range(4)]
    [1.0, 1.0, 1.0, 0.5]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    step = min(max(step, 0), num_steps - 1)
    warmup_steps = round(warmup * num_steps)
    warmdown_steps = round(warmdown * num_steps)
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    remaining = num_steps - step
    if warmdown_steps and remaining < warmdown_steps:
        return min(rise, final + (1 - final) * remaining / warmdown_steps)
    return rise


def muon_momentum(
    step: int,
    num_steps: int,
    *,
    low: float,
    high: float,
    warmup: float = 0.1,
    cooldown: float = 0.02,
) -> float:
    """Momentum at `step`: rises linearly from low to high, and falls back over the last steps.

    Gradients change quickly early in a run, so they are forgotten faster. At the end a shorter
    memory averages over the small last steps only.
    """
    progress = min(max(step, 0), num_steps) / num_steps
    rise = min(1.0, progress / warmup) if warmup else 1.0
    fall = min(1.0, (1 - progress) / cooldown) if cooldown else 1.0
    return low + (high - low) * min(rise, fall)
