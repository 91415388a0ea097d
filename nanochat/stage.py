"""What the training stages share: set-up, evaluation, saving. The loop itself is in each script."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from nanochat import paths
from nanochat.checkpoint_manager import CheckpointManager, latest, read_meta, restore
from nanochat.config import BaseConfig, MidConfig, RlConfig, to_dict
from nanochat.data.loader import Batch, DataLoader
from nanochat.data.sources import HeldOut, Source
from nanochat.errors import UserError
from nanochat.eval.losses import evaluate_bpb, evaluate_roles, mixture_bpb
from nanochat.fp8 import check_fp8, convert_to_fp8
from nanochat.gpt import GPT
from nanochat.log import RunLog
from nanochat.memory import Shape, memory_advice
from nanochat.optim import Optimizer, parameter_rules
from nanochat.plan import Plan, context_schedule, make_plan
from nanochat.runtime import Runtime, best_dtype
from nanochat.tokenizer import Tokenizer
from nanochat.train import LossScale, StepStats, TrainState, check_replicas

CONVERSATION_TOKENS = 2**14
"""Held-out tokens of conversations per evaluation, at most (but at least one batch)."""


class Loader(Protocol):
    """What a stage reads, as far as checkpoints and the log go."""

    @property
    def consumed(self) -> dict[str, dict[str, int]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


L = TypeVar("L", bound=Loader)


@dataclass
class Stage(Generic[L]):
    """One run of one stage: its parts, and what happens around a step."""

    name: str
    cfg: BaseConfig | MidConfig | RlConfig
    runtime: Runtime
    model: GPT
    tokenizer: Tokenizer
    plan: Plan
    loader: L
    held_out: HeldOut
    optimizer: Optimizer
    log: RunLog
    checkpoints: CheckpointManager
    state: TrainState
    loss_scale: LossScale | None
    extra_meta: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    """Up to when `state.elapsed_seconds` counts."""

    @property
    def finished(self) -> bool:
        return self.state.step >= self.plan.num_steps

    def record(self, stats: StepStats, more: Mapping[str, float] | None = None) -> None:
        """Count a finished step, log it, and check what is to be checked after it.

        `more` goes into the log beside what every stage measures.
        """
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
        if limit and time.monotonic() - self.started > limit * 3600:
            self.runtime.stop_signal = True

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.elapsed_seconds += now - self.last
        self.last = now

    def evaluate(self) -> dict[str, float]:
        """Measure what is held out from its start: the same rows each time."""
        sizes = torch.as_tensor(self.tokenizer.token_bytes()).to(self.runtime.device)
        texts, limit = self.held_out.texts, self.cfg.evaluating.eval_tokens
        results = [
            # Alone: the weights say how much of a corpus is in the mixture, not how much to read.
            evaluate_bpb(
                self.model,
                self._batches([replace(source, weight=1)], limit // len(texts)),
                sizes,
                self.runtime,
            )
            for source in texts
        ]
        metrics = {"bpb": results[0]["bpb"]}
        if len(texts) > 1:
            metrics = {"bpb": mixture_bpb(texts, results)}
            for source, result in zip(texts, results, strict=True):
                metrics[f"bpb_{_metric_name(source.name)}"] = result["bpb"]
        if self.held_out.conversations:
            # Every token is a target, and a weight below 1 tells that it is not the assistant's.
            sources = [replace(s, weight=1, prompt_weight=0.5) for s in self.held_out.conversations]
            batches = self._batches(sources, min(limit, CONVERSATION_TOKENS))
            metrics |= evaluate_roles(self.model, batches, self.runtime)
        self.state.metrics = metrics
        self.log.eval(self.state.step, metrics)
        return metrics

    def _batches(self, sources: Sequence[Source], tokens: int) -> Iterator[Batch]:
        """About so many tokens of one pass over the sources, over all ranks; at least one batch."""
        # As the last step was: positions never trained on would tell nothing of what was learned.
        phase = self.plan.phase(max(0, self.state.step - 1))
        T, rows = phase.sequence_length, phase.device_batch_size
        loader = DataLoader(
            sources,
            batch_size=rows,
            sequence_length=T,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            epochs=1,
            device=self.runtime.device,
            with_roles=True,
        )
        rows *= self.runtime.world_size
        available = -(-loader.num_rows(1) // rows)
        for _ in range(max(1, min(tokens // (T * rows), available))):
            yield next(loader)

    def save(self) -> None:
        """Start writing a checkpoint of the present state."""
        if self.loss_scale:
            self.state.loss_scale = self.loss_scale.state_dict()
        self.checkpoints.save(
            self.state.step,
            self.model,
            self.optimizer,
            {
                "stage": self.name,
                "tag": self.cfg.run.tag,
                "run_config": to_dict(self.cfg),
                "num_steps": self.plan.num_steps,
                "total_batch_size": self.plan.total_batch_size,
                "train_state": self.state.as_dict(),
                "loader_state": self.loader.state_dict(),
                "tokenizer_hash": self.tokenizer.hash,
                **self.extra_meta,
            },
        )

    def close(self) -> None:
        """Wait for the last checkpoint, then write the end of the log."""
        self.checkpoints.wait()
        self._count_time()
        if self.finished:
            self.log.end(self.state, self.loader.consumed)
        else:
            self.runtime.print(
                f"stopped after step {self.state.step} of {self.plan.num_steps}; "
                "the same command with --resume goes on from here"
            )


def describe_mixture(sources: Sequence[Source], tokens: int) -> str:
    """Each source's share of the targets, and how often a run of so many tokens reads it."""
    targets = [source.store.num_targets for source in sources]
    parts = [float(Fraction(str(s.weight)) * n) for s, n in zip(sources, targets, strict=True)]
    lines = [
        f"{source.name} {part / sum(parts):.1%} ({tokens * part / sum(parts) / n:.3g} passes)"
        for source, part, n in zip(sources, parts, targets, strict=True)
    ]
    return f"mixture: {', '.join(lines)}"


def _metric_name(name: str) -> str:
    """`./my books` -> `my_books`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._")


def set_up(
    name: str,
    cfg: BaseConfig | MidConfig,
    runtime: Runtime,
    model: GPT,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    held_out: HeldOut,
    extra_meta: dict[str, Any] | None = None,
) -> Stage[DataLoader]:
    """Plan the run, build the loader, and assemble the stage."""
    newest = checkpoint_to_resume(name, cfg)
    T = model.config.context_length

    def make_loader(rows: int) -> DataLoader:
        return DataLoader(
            sources,
            batch_size=rows,
            sequence_length=T,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=cfg.run.seed,
            window=cfg.batching.window,
            epochs=cfg.duration.epochs if cfg.duration.counts_epochs else None,
            device=runtime.device,
        )

    batching = cfg.batching
    if newest and batching.total_batch_size == "auto":
        # The rule rounds to whole rows of all ranks: go on with what it gave at the start, so that
        # another number of ranks takes the same steps.
        total = read_meta(newest, verify=False).get("total_batch_size", "auto")
        batching = replace(batching, total_batch_size=total)
    plan = make_plan(
        model.config,
        batching=batching,
        duration=cfg.duration,
        learning=cfg.learning,
        machine=runtime.machine(),
        rows_in_epochs=make_loader(1).num_rows,
        schedule=context_schedule(cfg) if isinstance(cfg, BaseConfig) else (),
    )
    model.recompute = cfg.batching.recompute
    loader = make_loader(plan.device_batch_size)
    phase = plan.phase(max(0, read_meta(newest, verify=False)["step"] - 1) if newest else 0)
    loader.set_rows(phase.sequence_length, phase.device_batch_size)
    stage = assemble(name, cfg, runtime, model, tokenizer, plan, loader, held_out, extra_meta)
    if len(sources) > 1 and not stage.finished:
        runtime.print(describe_mixture(sources, plan.tokens))
    return stage


def checkpoint_to_resume(name: str, cfg: BaseConfig | MidConfig | RlConfig) -> Path | None:
    """The newest checkpoint of the tag; UserError where there is one and --resume is not given."""
    folder = paths.checkpoints_dir(name, cfg.run.tag)
    newest = latest(folder)
    if newest and not cfg.run.resume:
        raise UserError(
            f"{folder} already holds {newest.name}; continue it with --resume, "
            "choose another --tag, or delete that folder"
        )
    return newest


def assemble(
    name: str,
    cfg: BaseConfig | MidConfig | RlConfig,
    runtime: Runtime,
    model: GPT,
    tokenizer: Tokenizer,
    plan: Plan,
    loader: L,
    held_out: HeldOut,
    extra_meta: dict[str, Any] | None = None,
) -> Stage[L]:
    """Build the optimizer, resume where that is asked for, and open the log."""
    folder, newest = paths.checkpoints_dir(name, cfg.run.tag), checkpoint_to_resume(name, cfg)
    if cfg.run.fp8:
        check_fp8(runtime.device, runtime.dtype)
    runtime.memory_advice = memory_advice(
        model.config,
        Shape(plan.device_batch_size, plan.sequence_length, model.recompute),
        runtime.machine(),
        rows_per_step=plan.device_batch_size * plan.micro_batches,
        fits=plan.largest_device_batch_size,
    )
    rules = parameter_rules(
        model,
        cfg.learning,
        width=model.config.n_embd,
        lr_scale=plan.lr_scale,
        weight_decay=plan.weight_decay,
    )
    native = best_dtype(runtime.device)
    optimizer = Optimizer(
        model,
        rules,
        rank=runtime.rank,
        world_size=runtime.world_size,
        muon_dtype=torch.float32 if native == torch.float16 else native,
    )
    state = TrainState()
    loss_scale = LossScale() if runtime.dtype == torch.float16 else None
    if newest:
        meta = restore(newest, model, optimizer, runtime)
        if meta["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"{newest} was trained with another tokenizer than the present one")
        if meta["num_steps"] != plan.num_steps:
            runtime.print(
                f"note: {newest.name} was planned for {meta['num_steps']} steps, "
                f"this run for {plan.num_steps}: the schedule changes here"
            )
        state = TrainState(**meta["train_state"])
        loader.load_state_dict(json.loads(json.dumps(meta["loader_state"])))
        if loss_scale:
            loss_scale.load_state_dict(state.loss_scale)
    if cfg.run.fp8:
        convert_to_fp8(model)
    if cfg.run.compile == "on" or (cfg.run.compile == "auto" and runtime.device.type == "cuda"):
        model.compile_loss()
    log = RunLog(name, cfg.run.tag, runtime, plan, cfg.run.wandb)
    checkpoints = CheckpointManager(folder, runtime, cfg.saving.keep_last)
    stage = Stage(
        name,
        cfg,
        runtime,
        model,
        tokenizer,
        plan,
        loader,
        held_out,
        optimizer,
        log,
        checkpoints,
        state,
        loss_scale,
        extra_meta or {},
    )
    if stage.finished:
        runtime.print(f"{name}/{cfg.run.tag} is finished: {newest} is its last step")
        if not log.has_ended():  # killed after the last checkpoint
            log.end(state, loader.consumed)
        return stage
    runtime.watch_signals()
    log.start(to_dict(cfg), to_dict(model.config), state)
    return stage
