"""Start of a run of reinforcement learning or preference optimisation.

These functions check its settings, load the model that it starts from, and plan its steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import (
    find,
    loaded_model,
    read_meta_once,
    saved_config,
    system_style,
    tokenizer_of,
)
from nanochat.config import Batching, Duration, RlConfig, from_dict
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.plan import Plan, make_plan
from nanochat.runtime import Runtime
from nanochat.stage import OpenRun, origin
from nanochat.tokenizer import SystemStyle, Tokenizer


def check_config(cfg: RlConfig) -> None:
    """Raise UserError for settings that cannot work."""
    rollouts = cfg.rollouts
    if cfg.algo == "dpo":
        if not cfg.preferences.pairs:
            raise UserError("--algo dpo needs --pairs FILE.jsonl")
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
    """Raise UserError if the run `name` began with another source or other rollouts."""
    if any(source[key] != resumed["source"][key] for key in ("stage", "tag", "step")):
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


@dataclass(frozen=True)
class Start:
    """Checkpoint that training starts from and is compared with."""

    folder: Path
    meta: dict[str, Any]
    model: GPT
    tokenizer: Tokenizer
    system: SystemStyle


def load_start(run: OpenRun, cfg: RlConfig) -> Start:
    """Load the source's checkpoint; a resumed run takes the step that it began with."""
    resumed, runtime = run.meta, run.runtime
    folder = find(cfg.source, resumed["source"]["step"] if resumed else None, cfg.run.tag)
    meta = read_meta_once(folder, runtime)
    if resumed:
        check_resumed(cfg, run.title, resumed, origin(meta))
    tokenizer = tokenizer_of(meta, folder)
    runtime.print(f"starting from {folder}")
    system = system_style(meta) if cfg.system == "auto" else cfg.system
    model = loaded_model(saved_config(meta, str(folder)), folder, meta, runtime)
    return Start(folder, meta, model, tokenizer, system)


@dataclass(frozen=True)
class RolloutPlan(Plan):
    """A plan in which tokens per step are an upper bound, as answers may be shorter."""

    what: str = ""
    """Description of a step's samples, for the console."""

    def describe(self) -> str:
        return (
            f"{sum(self.parameters.values()):,} parameters\n"
            f"{self.num_steps:,} steps x {self.what}; micro-batches of {self.device_batch_size} "
            f"rows x {self.sequence_length} tokens on {self.world_size} ranks; "
            f"lr scale {self.lr_scale:.3f}, weight decay {self.weight_decay:.4f}"
        )


def rollout_batching(cfg: RlConfig, context: int, world_size: int) -> Batching:
    """Batching for steps that have a row for each answer at most; short answers share a row."""
    answers = cfg.rollouts.prompts_per_step * (2 if cfg.algo == "dpo" else cfg.rollouts.group_size)
    rows = 1 if cfg.device_batch_size == "auto" else cfg.device_batch_size
    per_pass = rows * world_size
    return Batching(
        device_batch_size=cfg.device_batch_size,
        total_batch_size=-(-answers // per_pass) * per_pass * context,
        recompute=cfg.recompute,
    )


def plan_rollouts(
    cfg: RlConfig, config: GPTConfig, num_steps: int, what: str, runtime: Runtime
) -> RolloutPlan:
    """Plan a run of rollouts or pairs; `what` describes the samples of a step."""
    machine = runtime.machine()
    plan = make_plan(
        config,
        batching=rollout_batching(cfg, config.context_length, machine.world_size),
        duration=Duration(num_steps=num_steps),
        learning=cfg.learning,
        machine=machine,
    )
    return RolloutPlan(**vars(plan), what=what)
