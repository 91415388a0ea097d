"""A run of a training stage: its folder, what it resumes from, and saving and logging around steps.

with open_run("mid", cfg, runtime) as run:      folder, newest checkpoint, its metadata: read once
    run, model, tokenizer = open_model(run)     the model; for a new run, with the source's weights
    plan = make_plan(...)
    stage = Stage(run, model, tokenizer, plan)  optimizer and log; a resumed run is restored
    ...                                         the loop, in the script
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanochat import paths
from nanochat.checkpoint_manager import (
    CheckpointManager,
    build_model,
    check_tokenizer,
    find,
    latest,
    loaded_model,
    read_meta,
    read_meta_once,
    restore,
    saved_config,
    tokenizer_of,
)
from nanochat.config import (
    BaseConfig,
    Batching,
    MidConfig,
    RlConfig,
    changes,
    check_ranges,
    to_dict,
)
from nanochat.errors import UserError
from nanochat.fp8 import check_fp8, convert_to_fp8
from nanochat.gpt import GPT, extend_context
from nanochat.hardware import describe_processor
from nanochat.log import RunLog, check_wandb, read_records
from nanochat.memory import Shape, memory_advice
from nanochat.optim import Optimizer, parameter_rules
from nanochat.plan import Plan, inherited_batching
from nanochat.runtime import TIME_IS_UP, Runtime, best_dtype
from nanochat.tokenizer import Tokenizer
from nanochat.train import LossScale, StepStats, TrainState, check_finite, check_replicas, due

StageConfig = BaseConfig | MidConfig | RlConfig


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder is locked and read; nothing is loaded yet."""

    name: str
    """Name of the stage: base, mid, sft or rl."""
    cfg: StageConfig
    runtime: Runtime
    folder: Path
    """Folder of the run's checkpoints: checkpoints/<stage>/<tag>."""
    newest: Path | None
    """Step folder to resume from; None for a new run."""
    meta: dict[str, Any] | None
    """Metadata of `newest`."""
    logged: dict[str, Any] = field(default_factory=dict)
    """Records of that step in metrics.jsonl: its evaluation, its samples, the end of the run."""
    source: Mapping[str, Any] | None = None
    """Metadata of the checkpoint that the run starts from, set by `open_model`. A resumed run has
    only its `origin`; a base run has none."""

    @property
    def title(self) -> str:
        return f"{self.name}/{self.cfg.run.tag}"

    @property
    def finished(self) -> bool:
        """True if the last step is saved and logged and no setting has changed since."""
        if self.meta is None or self.meta["step"] < self.meta["num_steps"]:
            return False
        return bool(self.logged["end"]) and not changes(self.meta["run_config"], to_dict(self.cfg))

    @property
    def loader_state(self) -> dict[str, Any] | None:
        """Position of the loader to resume from; None for a new run."""
        return self.meta["loader_state"] if self.meta else None

    def batching(self, sequence_length: int) -> Batching:
        """Batching flags; `auto` means the step size that the run began with, or its source's.

        Without the former, another number of ranks would change the step size, since the rule for
        `auto` rounds to whole rows of all ranks.
        """
        assert not isinstance(self.cfg, RlConfig)
        batching = self.cfg.batching
        if self.meta and batching.total_batch_size == "auto":
            total = self.meta.get("total_batch_size", "auto")
            return replace(batching, total_batch_size=total)
        return inherited_batching(batching, self.source or {}, sequence_length)


@contextmanager
def open_run(name: str, cfg: StageConfig, runtime: Runtime) -> Iterator[OpenRun]:
    """Lock the run's folder and read it once, on rank 0; every rank must call this.

    Raises UserError for settings out of range, for a tag that exists if --resume is off, for a
    damaged checkpoint, for a run that another process is training, and for a source that has newer
    steps than those the run was started from.
    """
    check_ranges(cfg)
    if cfg.run.wandb and runtime.is_main:
        check_wandb()
    folder = paths.checkpoints_dir(name, paths.checked_name(cfg.run.tag, "--tag"))
    lock = paths.lock(folder, "training", wait=False) if runtime.is_main else nullcontext()
    with lock:
        run = OpenRun(
            name, cfg, runtime, folder, *runtime.on_main(lambda: _look_into(name, cfg, folder))
        )
        if run.finished:
            runtime.print(f"{run.title} is finished: {run.newest} is its last step")
        elif run.meta:
            for line in changes(run.meta["run_config"], to_dict(cfg)):
                runtime.print(f"changed since step {run.meta['step']}: {line}")
            began = run.meta.get("processor")
            if began and began != describe_processor():
                runtime.print(
                    f"note: until step {run.meta['step']} it ran on {began}, now on "
                    f"{describe_processor()}: from here on results are equal up to rounding only"
                )
        yield run


def _look_into(
    name: str, cfg: StageConfig, folder: Path
) -> tuple[Path | None, dict[str, Any] | None, dict[str, Any]]:
    paths.remove_leftovers(folder)
    newest = latest(folder)
    if newest is None:
        return None, None, {}
    if not cfg.run.resume:
        raise UserError(
            f"{folder} already holds {newest.name}; continue it with --resume, "
            "choose another --tag, or delete that folder"
        )
    meta = read_meta(newest)
    saved = (meta["run_config"].get("learning") or {}).get("matrix_optimizer", "muon")
    if saved != cfg.learning.matrix_optimizer:
        raise UserError(
            f"{newest} has the optimizer state of --matrix-optimizer {saved}, not of "
            f"{cfg.learning.matrix_optimizer}; resume with --matrix-optimizer {saved}, or choose "
            "another --tag"
        )
    source = meta.get("source")
    if source and source.get("digest"):
        now = latest(paths.checkpoints_dir(source["stage"], source["tag"]))
        digest = now and read_meta(now)["digest"]
        if now and digest != source["digest"]:
            raise UserError(
                f"{folder} was trained from {source['stage']}/{source['tag']} step "
                f"{source['step']}, which has moved on to {now.name} since; delete {folder} to "
                "train it again, or choose another --tag"
            )
    records = read_records(paths.run_dir(name, cfg.run.tag) / "metrics.jsonl")
    here = [r for r in records if r.get("step") == meta["step"]]
    evaluations = [r for r in here if r["kind"] == "eval"]
    logged = {
        "evaluation": {k: v for k, v in evaluations[-1].items() if k not in ("kind", "step")}
        if evaluations
        else None,
        "samples": any(r["kind"] == "sample" for r in here),
        "end": bool(records) and records[-1]["kind"] == "end",
    }
    return newest, meta, logged


def origin(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of a checkpoint, which a run started from it saves in its own metadata."""
    return {key: meta[key] for key in ("stage", "tag", "step", "digest") if key in meta}


def open_model(run: OpenRun) -> tuple[OpenRun, GPT, Tokenizer]:
    """Build the model of a stage after base; returns the run with its source, model and tokenizer.

    A new run gets the weights of its source. A resumed run needs only its own folder, so its source
    may be gone; `Stage` reads its weights together with the optimizer state.
    """
    cfg, runtime = run.cfg, run.runtime
    context = getattr(cfg, "context_length", None)
    if run.meta is not None and run.newest is not None:
        config = saved_config(run.meta, str(run.newest))
        if context not in (None, config.context_length):
            raise UserError(
                f"{run.newest} has a context of {config.context_length} tokens, --context-length "
                f"is {context}; resume with the same flags, or choose another --tag"
            )
        tokenizer = tokenizer_of(run.meta, run.newest)
        run = replace(run, source=run.meta["source"])
        return run, build_model(config, runtime), tokenizer
    assert not isinstance(cfg, BaseConfig)
    folder = find(cfg.source, tag=cfg.run.tag)
    meta = read_meta_once(folder, runtime)
    config = saved_config(meta, str(folder))
    if context is not None:
        config = extend_context(config, context, cfg.rope_scaling)  # type: ignore[union-attr]
    model = loaded_model(config, folder, meta, runtime)
    runtime.print(f"starting from {folder}")
    if meta["step"] < meta["num_steps"]:
        runtime.print(f"note: that run is not finished, it is to have {meta['num_steps']} steps")
    return replace(run, source=meta), model, tokenizer_of(meta, folder)


class Stage:
    """A run with its model, optimizer, log and checkpoints."""

    def __init__(self, run: OpenRun, model: GPT, tokenizer: Tokenizer, plan: Plan):
        """Build the optimizer, restore weights and optimizer of a resumed run, and open the log."""
        cfg, runtime = run.cfg, run.runtime
        self.run, self.cfg, self.runtime = run, cfg, runtime
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        model.recompute = (cfg if isinstance(cfg, RlConfig) else cfg.batching).recompute
        if cfg.run.fp8:
            check_fp8(runtime.device, runtime.dtype)
        runtime.memory_advice = memory_advice(
            model.config,
            Shape(plan.device_batch_size, plan.sequence_length, model.recompute),
            runtime.machine(),
            cfg.learning,
            rows_per_step=plan.device_batch_size * plan.micro_batches,
            fits=plan.largest_device_batch_size,
        )
        native = best_dtype(runtime.device)
        self.optimizer = Optimizer(
            model,
            parameter_rules(
                model,
                cfg.learning,
                width=model.config.n_embd,
                lr_scale=plan.lr_scale,
                weight_decay=plan.weight_decay,
            ),
            rank=runtime.rank,
            world_size=runtime.world_size,
            muon_dtype=torch.float32 if native == torch.float16 else native,
        )
        self.state = TrainState()
        self.loss_scale = LossScale() if runtime.dtype == torch.float16 else None
        if run.meta is not None and run.newest is not None:
            self._restore(run.newest, run.meta)
        if cfg.run.fp8:
            convert_to_fp8(model)
        if cfg.run.compiles(runtime.device):
            model.compile_loss()
        self.log = RunLog(run.name, cfg.run.tag, runtime, plan, cfg.run.wandb)
        self.checkpoints = CheckpointManager(run.folder, runtime, cfg.saving.keep_last)
        self.first_step = self.state.step
        self._started = self._counted = time.monotonic()
        runtime.watch_signals()
        self.log.start(to_dict(cfg), to_dict(model.config), self.state, tokenizer.hash)

    def _restore(self, newest: Path, meta: dict[str, Any]) -> None:
        check_tokenizer(meta, self.tokenizer, newest)
        restore(newest, meta, self.model, self.optimizer, self.runtime)
        if meta["num_steps"] != self.plan.num_steps:
            self.runtime.print(
                f"note: {newest.name} was planned for {meta['num_steps']} steps, "
                f"this run for {self.plan.num_steps}: the schedule changes here"
            )
        self.state = TrainState(**meta["train_state"])
        if self.loss_scale:
            self.loss_scale.load_state_dict(self.state.loss_scale)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.plan.num_steps

    # Actions at the top of a step, in this order: save, evaluate, sample

    def save_due(self, step: int, every: int) -> bool:
        """True if a save is due before `step`: every `every` steps, at the end, when stopping."""
        last = step == self.plan.num_steps
        return step > self.first_step and (due(step, every, last) or self.runtime.stop_requested)

    def evaluation_due(self, step: int, every: int) -> bool:
        """True if an evaluation is due before `step` and the resumed log does not have it yet."""
        if not (step == 0 or due(step, every, step == self.plan.num_steps)):
            return False
        known = self.run.logged.get("evaluation") if step == self.first_step else None
        if known is not None:
            self.state.metrics = known
        return known is None

    def samples_due(self, step: int, every: int) -> bool:
        """True if samples are due before `step`; never at the start of a base run."""
        logged = step == self.first_step and self.run.logged.get("samples", True)
        return step > 0 and not logged and due(step, every, step == self.plan.num_steps)

    def save(self, position: Mapping[str, Any], consumed: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; `position` and `consumed` come from the loader.

        Raises NonFiniteWeights if a weight or the optimizer state is not finite.
        """
        check_finite(self.optimizer, self.runtime, self.state.step)
        if self.loss_scale:
            self.state.loss_scale = self.loss_scale.state_dict()
        meta = {
            "stage": self.run.name,
            "tag": self.cfg.run.tag,
            "run_config": to_dict(self.cfg),
            "num_steps": self.plan.num_steps,
            "total_batch_size": self.plan.total_batch_size,
            "train_state": to_dict(self.state),
            "loader_state": dict(position),
            "consumed": dict(consumed),
            "tokenizer_hash": self.tokenizer.hash,
            "processor": describe_processor(),
        }
        if self.run.source:
            meta["source"] = origin(self.run.source)
        self.checkpoints.save(self.state.step, self.model, self.optimizer, meta)

    def log_evaluation(self, metrics: dict[str, float]) -> None:
        self.state.metrics = metrics
        self.log.eval(self.state.step, metrics)

    def show(self, sample: Callable[[], list[tuple[str, str]]]) -> None:
        """Print and log (prompt, text) pairs on rank 0; training goes on if that fails."""
        if not self.runtime.is_main:
            return
        try:
            for prompt, text in sample():
                self.log.sample(self.state.step, prompt, text)
        except Exception as error:  # a failing sample must not end the run
            self.runtime.print(f"note: no samples at step {self.state.step}: {error}")

    def record(self, stats: StepStats, more: Mapping[str, float] | None = None) -> None:
        """Count and log a finished step; check replicas, the last save and the time limit.

        `more` are further measurements for the log.
        """
        if self.state.step == self.first_step:
            # What is there now stays: looking through all of it again and again takes time in which
            # nothing is launched.
            gc.collect()
            gc.freeze()
        self.state.step += 1
        self.state.tokens += stats.tokens
        self.state.seconds += stats.seconds
        self._count_time()
        lr_multiplier = self.plan.hypers(self.state.step - 1).lr_multiplier
        self.log.train(self.state, stats, lr_multiplier, more)
        self.checkpoints.check()
        every = self.cfg.run.check_replicas
        if every and self.state.step % every == 0:
            check_replicas(self.model, self.runtime)
        limit = self.cfg.saving.max_hours
        if limit and time.monotonic() - self._started > limit * 3600:
            self.runtime.stop(TIME_IS_UP)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.elapsed_seconds += now - self._counted
        self._counted = now

    def close(self, consumed: Mapping[str, Any]) -> None:
        """Wait for the last checkpoint, then write the end of the log."""
        gc.unfreeze()
        self.checkpoints.wait()
        self._count_time()
        if self.finished:
            self.runtime.exit_code = 0  # complete, even if a signal came in the last step
            self.log.end(self.state, dict(consumed))
        else:
            self.runtime.print(
                f"stopped after step {self.state.step} of {self.plan.num_steps}; "
                "the same command with --resume goes on from here"
            )
