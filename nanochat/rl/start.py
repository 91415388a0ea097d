"""How a run of reinforcement learning or preference optimisation begins.

Its settings are checked, the weights it starts from are found and loaded, its steps are planned.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import (
    find,
    load_weights,
    read_meta,
    system_style,
    tokenizer_of,
)
from nanochat.config import Batching, Duration, RlConfig, from_dict
from nanochat.data.sources import HeldOut
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.plan import Plan, make_plan
from nanochat.rl.rollouts import RowStream
from nanochat.runtime import Runtime
from nanochat.stage import Stage, assemble, checkpoint_to_resume
from nanochat.tokenizer import SystemStyle, Tokenizer


def check_config(cfg: RlConfig) -> None:
    """UserError for values that make no sense."""
    rollouts, evaluating = cfg.rollouts, cfg.evaluating
    limits = (
        ("num-steps", 1 if cfg.num_steps is None else cfg.num_steps, 1),
        ("epochs", cfg.epochs, 1),
        ("prompts-per-step", rollouts.prompts_per_step, 1),
        ("max-tokens", rollouts.max_tokens, 1),
        ("max-slots", rollouts.max_slots, 1),
        ("updates-per-rollout", rollouts.updates_per_rollout, 1),
        ("max-importance", rollouts.max_importance, 1),
        ("format-bonus", rollouts.format_bonus, 0),
        ("eval-problems", evaluating.eval_problems, 1),
        ("eval-samples", evaluating.eval_samples, 1),
        ("device-batch-size", 1 if cfg.device_batch_size == "auto" else cfg.device_batch_size, 1),
    )
    for flag, value, least in limits:
        if not least <= value < math.inf:
            raise UserError(f"--{flag} {value} must be at least {least}")
    if cfg.algo == "dpo":
        if not cfg.preferences.pairs:
            raise UserError("--algo dpo needs --pairs FILE.jsonl")
        if not 0 < cfg.preferences.beta < math.inf:
            raise UserError(
                f"--beta {cfg.preferences.beta} must be above 0 and finite, such as 0.1"
            )
    elif rollouts.group_size < 2:
        raise UserError(
            f"--group-size {rollouts.group_size} leaves nothing to compare an answer with; "
            "take at least 2"
        )
    updates = 1 if cfg.algo == "dpo" else rollouts.updates_per_rollout
    if cfg.num_steps is not None and cfg.num_steps % updates:
        raise UserError(
            f"--num-steps {cfg.num_steps} must be a multiple of --updates-per-rollout {updates}"
        )


def check_resumed(
    cfg: RlConfig, name: str, resumed: dict[str, Any], source: dict[str, Any]
) -> None:
    """UserError where the run `name` would go on with other things than it began with."""
    if source != resumed["source"]:
        began, now = (
            f"{s['stage']}/{s['tag']} step {s['step']}" for s in (resumed["source"], source)
        )
        raise UserError(
            f"{name} started from {began}, --source {cfg.source} is {now}: it would be compared "
            "with another model; resume with the --source it had, or choose another --tag"
        )
    saved = from_dict(RlConfig, resumed["run_config"], name)
    before, here = saved.rollouts.updates_per_rollout, cfg.rollouts.updates_per_rollout
    if cfg.algo != "dpo" and before != here:
        raise UserError(
            f"{name} has --updates-per-rollout {before}, this run has {here}: its steps would be "
            "counted as other rollouts; resume with the same value, or choose another --tag"
        )


def origin(meta: dict[str, Any]) -> dict[str, Any]:
    """Which checkpoint it is, as the one trained from it notes it."""
    return {"stage": meta["stage"], "tag": meta["tag"], "step": meta["step"]}


@dataclass(frozen=True)
class Start:
    """What training starts from, and is compared with."""

    folder: Path
    meta: dict[str, Any]
    model: GPT
    tokenizer: Tokenizer
    system: SystemStyle


def load_start(cfg: RlConfig, runtime: Runtime) -> Start:
    """The source's model; a resumed run takes the step that it took when it began."""
    newest = checkpoint_to_resume("rl", cfg)
    resumed = read_meta(newest, verify=False) if newest else None
    folder = find(cfg.source, resumed["source"]["step"] if resumed else None)
    meta = read_meta(folder)
    if resumed:
        check_resumed(cfg, f"rl/{cfg.run.tag}", resumed, origin(meta))
    tokenizer = tokenizer_of(meta, folder)
    runtime.print(f"starting from {folder}")
    return Start(
        folder,
        meta,
        model_of(folder, meta, runtime),
        tokenizer,
        system_style(meta) if cfg.system == "auto" else cfg.system,
    )


def model_of(folder: Path, meta: dict[str, Any], runtime: Runtime) -> GPT:
    config = from_dict(GPTConfig, meta["model_config"], str(folder))
    with torch.device("meta"):
        model = GPT(config, runtime.dtype)
    model.to_empty(device=runtime.device)
    load_weights(folder, model)
    return model


@dataclass(frozen=True)
class RolloutPlan(Plan):
    """A plan whose tokens per step are at most so many: how long answers get is not known."""

    what: str = ""
    """What a step consists of, for people."""

    def describe(self) -> str:
        return (
            f"{sum(self.parameters.values()):,} parameters\n"
            f"{self.num_steps:,} steps x {self.what}; micro-batches of {self.device_batch_size} "
            f"rows x {self.sequence_length} tokens on {self.world_size} ranks; "
            f"lr scale {self.lr_scale:.3f}, weight decay {self.weight_decay:.4f}"
        )


def open_stage(
    cfg: RlConfig,
    runtime: Runtime,
    start: Start,
    stream: RowStream,
    num_steps: int,
    samples: int,
    what: str,
) -> Stage[RowStream]:
    """Plan the run and assemble the stage; a step trains on at most `samples` documents."""
    model, T = start.model, start.model.config.context_length
    rows = 1 if cfg.device_batch_size == "auto" else cfg.device_batch_size
    per_pass = rows * runtime.world_size
    plan = make_plan(
        model.config,
        batching=Batching(
            device_batch_size=cfg.device_batch_size,
            total_batch_size=-(-samples // per_pass) * per_pass * T,
            recompute=cfg.recompute,
        ),
        duration=Duration(num_steps=num_steps),
        learning=cfg.learning,
        machine=runtime.machine(),
    )
    model.recompute = cfg.recompute
    return assemble(
        "rl",
        cfg,
        runtime,
        model,
        start.tokenizer,
        RolloutPlan(**vars(plan), what=what),
        stream,
        HeldOut([]),
        {"source": origin(start.meta)},
    )


def is_compiled(cfg: RlConfig, runtime: Runtime) -> bool:
    """Then every micro-batch should have the same shape."""
    return cfg.run.compile == "on" or (cfg.run.compile == "auto" and runtime.device.type == "cuda")
