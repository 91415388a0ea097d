"""The arithmetic of a run: steps, batches, rates, and errors that name a remedy."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from nanochat import plan as plan_module
from nanochat.config import Batching, Duration, Learning
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig, config_from_depth
from nanochat.hardware import Machine
from nanochat.memory import Shape, estimate_memory
from nanochat.plan import (
    Plan,
    inherited_batching,
    make_plan,
    scaled_batch_size,
    scaled_lr,
    scaled_weight_decay,
)

CONFIG = config_from_depth(2, 300, aspect_ratio=16, head_dim=16, context_length=64)


def plan(
    batching: dict[str, Any] | None = None,
    duration: dict[str, Any] | None = None,
    learning: dict[str, Any] | None = None,
    config: GPTConfig = CONFIG,
    world_size: int = 1,
    rows: int = 100,
    memory_limit: int | None = None,
) -> Plan:
    return make_plan(
        config,
        batching=Batching(**(batching or {})),
        duration=Duration(**(duration if duration is not None else {"num_steps": 10})),
        learning=Learning(**(learning or {})),
        machine=Machine("cpu", torch.float32, world_size, memory_limit),
        rows_in_epochs=lambda epochs: rows * epochs,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", ["auto", 1, 3, 4])
@pytest.mark.parametrize("total", ["auto", 64 * 1440])
def test_micro_batches_fill_the_step(world_size: int, rows: Any, total: Any) -> None:
    made = plan({"device_batch_size": rows, "total_batch_size": total}, world_size=world_size)
    per_step = made.device_batch_size * made.micro_batches * world_size
    assert made.total_batch_size == per_step * 64
    assert made.rows_per_step == per_step
    assert made.tokens == 10 * made.total_batch_size
    if rows != "auto":
        assert made.device_batch_size == rows
    if total != "auto":
        assert made.total_batch_size == total, "no rank count changes what was asked for"


def test_steps_from_each_kind_of_duration() -> None:
    batch = {"total_batch_size": 640}  # ten rows
    assert plan(batch, {"num_steps": 7}).num_steps == 7
    assert plan(batch, {"target_tokens": 6_400}).num_steps == 10
    assert plan(batch, {"epochs": 1}, rows=100).num_steps == 10
    assert plan(batch, {"epochs": 1}, rows=101).num_steps == 11, "the last rows count too"
    assert plan(batch, {"epochs": 3}, rows=101).num_steps == 31
    by_flops = plan(batch, {"target_flops": plan(batch, {"num_steps": 20}).flops})
    assert by_flops.num_steps == 20
    by_ratio = plan(batch, {"target_param_data_ratio": 2.0})
    scaling = by_ratio.parameters["block_matrices"] + by_ratio.parameters["head"]
    assert by_ratio.num_steps == round(2 * scaling / 640)
    assert plan(batch, {}).num_steps == round(12 * scaling / 640), "the default ratio"
    assert plan(batch, {"target_tokens": 1}).num_steps == 1


def test_other_durations_win_over_epochs() -> None:
    batch = {"total_batch_size": 640}
    assert plan(batch, {"epochs": 1, "num_steps": 3}).num_steps == 3
    assert plan(batch, {"epochs": 1, "target_tokens": 64_000}).num_steps == 100


def test_a_small_corpus_is_not_read_more_often_than_allowed() -> None:
    batch = {"total_batch_size": 640}
    for duration in ({"num_steps": 100}, {"target_tokens": 64_000}, {"epochs": 9}):
        assert plan(batch, {**duration, "max_epochs": 3}, rows=101).num_steps == 31
    assert plan(batch, {"num_steps": 5, "max_epochs": 3}, rows=101).num_steps == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batching": {"total_batch_size": 1000}}, r"1000 must be a multiple of 64 .* try 1024"),
        ({"batching": {"total_batch_size": 0}}, r"total_batch_size 0 .* try 64"),
        ({"batching": {"total_batch_size": -64}}, r"total_batch_size -64"),
        ({"batching": {"device_batch_size": 0}}, r"--device-batch-size 0"),
        ({"duration": {"num_steps": 0}}, r"num-steps 0"),
        ({"duration": {"num_steps": -3}}, r"num-steps -3"),
        ({"duration": {"epochs": 0}}, r"--epochs 0"),
        ({"duration": {"num_steps": 9, "max_epochs": 0}}, r"--max-epochs 0"),
        ({"duration": {"target_tokens": 0}}, r"0 tokens"),
        ({"duration": {"target_tokens": -5}}, r"-5 tokens"),
        ({"duration": {"target_flops": 0.0}}, r"0 tokens"),
        ({"duration": {"target_param_data_ratio": 0.0}}, r"0 tokens"),
    ],
)
def test_impossible_arithmetic_is_a_user_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**settings)


@pytest.mark.parametrize(
    ("batching", "world_size", "rows", "micro_batches"),
    [
        ({"total_batch_size": 640, "device_batch_size": 4}, 1, 4, 3),
        ({"total_batch_size": 64}, 2, 1, 1),
        ({"total_batch_size": 512}, 3, 3, 1),
        ({"total_batch_size": 512, "device_batch_size": 2}, 3, 2, 2),
    ],
)
def test_rows_that_do_not_divide_evenly_leave_some_empty(
    batching: dict[str, Any], world_size: int, rows: int, micro_batches: int
) -> None:
    """A run begun on 8 ranks goes on with the same steps on 3."""
    made = plan(batching, world_size=world_size)
    assert made.total_batch_size == batching["total_batch_size"]
    assert (made.device_batch_size, made.micro_batches) == (rows, micro_batches)
    assert rows * micro_batches * world_size >= made.rows_per_step


def test_epochs_need_the_data() -> None:
    with pytest.raises(UserError, match="--epochs needs the encoded data"):
        make_plan(
            CONFIG,
            batching=Batching(),
            duration=Duration(epochs=1),
            learning=Learning(),
            machine=Machine("cpu", torch.float32),
        )


def test_scaling_rules() -> None:
    reference = 1e9
    assert scaled_batch_size(reference, reference) == 2**19
    assert scaled_batch_size(2**10 * reference, reference) == 2**23, "0.383 x 10 = 3.83, rounded"
    assert scaled_lr(2**19) == 1
    assert scaled_lr(2**21) == 2
    assert scaled_lr(2**17) == scaled_lr(4096) == plan_module.MINIMAL_LR_SCALE, "bounded from below"
    decay = scaled_weight_decay(2**19, 0.02, 1.0, reference, reference)
    assert decay == plan_module.REFERENCE_DECAY
    # What is forgotten over a run, rate x decay x steps, depends on neither batch nor scale.
    for batch, scale, tokens in ((2**19, 1.0, 1e9), (2**21, 2.0, 1e9), (2**17, 0.5, 1e9)):
        decay = scaled_weight_decay(batch, 0.02, scale, tokens, reference)
        assert scale * decay * tokens / batch == pytest.approx(0.2 * 1e9 / 2**19)


@pytest.mark.parametrize("num_steps", [1, 5, 50, 500])
@pytest.mark.parametrize("lr", [0.02, 0.3])
def test_decay_never_takes_much_of_a_weight_in_one_step(num_steps: int, lr: float) -> None:
    made = plan(duration={"num_steps": num_steps}, learning={"matrix_lr": lr})
    assert 0 < lr * made.lr_scale * made.weight_decay <= 0.02 + 1e-9


@pytest.mark.parametrize("learning", [{"matrix_lr": 0.0}, {"lr_scale": 0.0}])
def test_frozen_matrices_do_not_decay(learning: dict[str, Any]) -> None:
    assert plan(learning=learning).weight_decay == 0


def test_depth_twelve_is_the_reference() -> None:
    made = plan(config=config_from_depth(12, 65536), duration={})
    assert made.total_batch_size == 2**19
    assert made.lr_scale == 1
    assert made.weight_decay == pytest.approx(plan_module.REFERENCE_DECAY, rel=0.01)


def test_overrides_are_taken_as_they_are() -> None:
    made = plan(learning={"lr_scale": 0.125, "weight_decay": 0.0})
    assert (made.lr_scale, made.weight_decay) == (0.125, 0.0)


def test_hypers_follow_the_schedule() -> None:
    made = plan(duration={"num_steps": 100}, learning={"warmup": 0.1, "warmdown": 0.2})
    assert made.hypers(0).lr_multiplier == pytest.approx(0.1)
    assert made.hypers(50).lr_multiplier == 1
    assert made.hypers(99).lr_multiplier == pytest.approx(0.05)
    assert made.hypers(0).momentum == 0.85
    assert made.hypers(50).momentum == pytest.approx(0.95)


def test_a_plan_can_be_logged_and_told() -> None:
    made = plan()
    assert json.loads(json.dumps(dataclasses.asdict(made)))["num_steps"] == 10
    for text in ("10 steps", f"{made.total_batch_size:,} tokens", "micro-batches", "lr scale"):
        assert text in made.describe()
    assert math.isfinite(made.flops)
    assert dataclasses.is_dataclass(made)


def test_auto_rows_are_the_most_that_fit_and_divide() -> None:
    batch = {"total_batch_size": 64 * 12}
    assert plan(batch).device_batch_size == 12
    machine = Machine("cpu", torch.float32)
    needed = {
        rows: estimate_memory(CONFIG, Shape(rows, 64), machine, Learning())["total"]
        for rows in (1, 4, 8)
    }
    assert needed[1] < needed[4] < needed[8]
    assert plan(batch, memory_limit=needed[4]).device_batch_size == 4
    assert plan(batch, memory_limit=needed[8] - 1).device_batch_size == 4
    with pytest.raises(UserError, match="not even one row of 64 tokens"):
        plan(batch, memory_limit=needed[1] - 1)


def test_a_step_size_is_inherited_in_whole_rows() -> None:
    source = {"stage": "base", "total_batch_size": 4096}
    auto, chosen = Batching(recompute=True), Batching(total_batch_size=512)
    for T, total in ((64, 4096), (96, 42 * 96), (8192, 8192)):
        inherited = inherited_batching(auto, source, T)
        assert inherited == dataclasses.replace(auto, total_batch_size=total)
    for other in ({}, {"stage": "base"}, {**source, "stage": "rl"}):
        assert inherited_batching(auto, other, 64) == auto
    assert inherited_batching(chosen, source, 64) == chosen
