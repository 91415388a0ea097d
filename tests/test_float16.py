"""float16 training on several ranks: what the dynamic loss scale is for."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_runs
import torch

from benchmarks.common import words
from nanochat import runtime
from nanochat.checkpoint_manager import latest, read_meta
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.runtime import Runtime
from nanochat.train import Batch, LossScale, train_step

CONFIG = GPTConfig(
    vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, context_length=12
)

# The same in every step, whatever their number.
FLAT = {"warmup": 0.0, "warmdown": 0.0, "muon_momentum": (0.9, 0.9), "weight_decay": 0.0}


def make(dtype: torch.dtype, rank: Runtime) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG, dtype).init_weights(0, words(CONFIG.vocab_size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that every parameter has a gradient from the first step
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    rules = parameter_rules(model, Learning(), width=16)
    return model, Optimizer(
        model, rules, rank=rank.rank, world_size=rank.world_size, muon_dtype=torch.float32
    )


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (4, 13), generator=generator)
    return Batch(
        inputs=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        weights=torch.ones(4, 12),
        doc_ids=torch.zeros(4, 12, dtype=torch.int32),
    )


class Recorder(Optimizer):
    """Keeps the gradients of the step instead of taking it."""

    def step(self, hypers: Hypers) -> None:
        self.seen = torch.cat([p.grad.flatten().clone() for p in self.parameters.values()])


def gradients(dtype: torch.dtype, scale: LossScale | None) -> torch.Tensor:
    """Gradients of a step whose targets are shared among a million of other ranks."""
    rank = runtime.single()
    model, _ = make(dtype, rank)
    optimizer = Recorder(model, parameter_rules(model, Learning(), width=16))
    train_step(model, optimizer, [batch(0)], Hypers(), rank, scale, divisor=10**6)
    return optimizer.seen


def test_small_gradients_survive() -> None:
    expected = gradients(torch.float32, None)

    def error(got: torch.Tensor) -> float:
        return ((got - expected).norm() / expected.norm()).item()

    assert error(gradients(torch.float16, LossScale(2.0**16))) < 0.01
    assert error(gradients(torch.float16, LossScale(1.0))) > 0.1, "they need the scale"


def overflow_on_one(rank: Runtime) -> list[Any]:
    """Rank 1's rows weigh so much at the third step that its gradients overflow."""
    model, optimizer = make(torch.float16, rank)
    scale = LossScale(2.0**10, growth_interval=3)
    history: list[Any] = []
    for step in range(7):
        data = batch(10 * step + rank.rank)
        if step == 2 and rank.rank == 1:
            data.weights *= 1e4
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        stats = train_step(model, optimizer, [data], Hypers(0.1), rank, scale)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        history.append((stats.skipped, torch.equal(before, after), scale.scale, optimizer.steps))
    return [history, after.tolist()]


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    first, second = processes.run_ranks(overflow_on_one, 2)
    assert first == second, "the same on both ranks, parameters included"
    skipped, unchanged, scales, steps = zip(*first[0], strict=True)
    assert skipped == unchanged == (False, False, True, False, False, False, False)
    # Halved by the overflow, doubled after three good steps.
    assert scales == (1024, 1024, 512, 512, 512, 1024, 1024)
    assert steps == (1, 2, 2, 3, 4, 5, 6)


def test_a_resumed_run_goes_on_with_the_scale_it_had(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**24, 2))
    half = replace(runtime.single(), dtype=torch.float16)
    losses = {}
    for name, parts in (("whole", (6,)), ("parts", (3, 6))):
        shutil.copytree(encoded, tmp_path / name)
        for steps in parts:
            config = tiny_runs.base_config(
                tiny_runs.corpus(encoded),
                run={"dtype": "float16", "resume": steps == 6 and len(parts) > 1},
                learning={
                    "warmup": 0.0,
                    "warmdown": 0.0,
                    "muon_momentum": (0.9, 0.9),
                    "weight_decay": 0.0,
                },
                duration={"num_steps": steps},
                evaluating={"eval_every": 0},
            )
            tiny_runs.train("base", tmp_path / name, config, half)
        newest = latest(tmp_path / name / "checkpoints" / "base" / "default")
        assert newest is not None
        state = read_meta(newest)["train_state"]
        losses[name] = (tiny_runs.losses(tmp_path / name, "base"), state["loss_scale"])
    assert losses["whole"] == losses["parts"]
    assert losses["whole"][1]["scale"] < 2.0**24, "it did have to find one"
