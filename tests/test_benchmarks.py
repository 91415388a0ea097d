"""Benchmarks of the training core run and measure what they say, at a tiny size."""

from pathlib import Path

import torch

from benchmarks import checkpoint, memory, optimizer_step
from nanochat.checkpoint_manager import list_steps
from nanochat.gpt import GPT
from nanochat.optim import Optimizer


def test_checkpoint(tmp_path: Path) -> None:
    cfg = checkpoint.Config(depth=1, vocab_size=300, context_length=32, repeats=2)
    result = checkpoint.measure(cfg, tmp_path / "run")
    assert {"copy", "stall", "slowed", "synchronous"} <= result["milliseconds"].keys()
    assert result["stall_to_copy"] > 0
    assert list_steps(tmp_path / "run") == [6], "two in each round"


def test_optimizer_share() -> None:
    cfg = optimizer_step.Config(
        depth=1, vocab_size=300, context_length=32, rows=2, micro_batches=2, repeats=2
    )
    result = optimizer_step.share_of_a_step(cfg, torch.float32)
    assert 0 < result["share"] < 1
    assert result["optimizer_ms"] < result["step_ms"]


def test_bytes_on_ranks() -> None:
    """Counted at the collectives, they are what the optimizer says it sends."""
    cfg = optimizer_step.Config(depth=3, vocab_size=300, context_length=32)
    result = optimizer_step.communicated(cfg, 2)
    model = GPT(optimizer_step.model_config(cfg)).init_weights(0)
    rules = optimizer_step.parameter_rules(model, optimizer_step.Learning(), width=192)
    assert result["sent"] == Optimizer(model, rules, rank=0, world_size=2).bytes_communicated()
    assert 1 <= result["ratio"] < 1.4


def test_memory_shapes_are_distinct() -> None:
    assert len(set(memory.SHAPES)) == len(memory.SHAPES)
    for kind in ("dtype", "recompute", "rows", "depth", "context_length"):
        assert len({getattr(shape, kind) for shape in memory.SHAPES}) > 1
