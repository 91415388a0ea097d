"""Benchmarks of the training core run and measure what they say, at a tiny size."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch

from benchmarks import checkpoint, contention, gpu, memory, optimizer_step, startup
from benchmarks.common import words
from nanochat.checkpoint_manager import list_steps
from nanochat.config import Learning
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
    sent = []
    for halved in (False, True):
        result = optimizer_step.communicated(cfg, 2, halved)
        model = GPT(optimizer_step.model_config(cfg)).init_weights(0, words(300))
        learning = Learning(bf16_transfers=halved)
        rules = optimizer_step.parameter_rules(model, learning, width=192)
        optimizer = Optimizer(model, rules, rank=0, world_size=2)
        assert result["sent"] == optimizer.bytes_communicated()
        assert halved or 1 <= result["ratio"] < 1.4
        sent.append(result["sent"])
    groups = model.num_parameters()
    tables = groups["embedding"] + groups["value_embeddings"] + groups["head"]
    # Of each table a rank sends half, as gradients and as rows, in two bytes less.
    assert sent[0] - sent[1] == 2 * tables


def test_memory_shapes_are_distinct() -> None:
    assert len(set(memory.SHAPES)) == len(memory.SHAPES)
    for kind in ("dtype", "recompute", "rows", "depth", "context_length"):
        assert len({getattr(shape, kind) for shape in memory.SHAPES}) > 1


QUICK = [name for name in gpu.LINES if name not in ("tests", "pipeline", "learning")]


def test_a_dry_run_of_what_waits_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line's code runs on a CPU, but for what only CUDA can do."""
    monkeypatch.setattr(gpu, "TINY", dataclasses.replace(gpu.TINY, steps=1, rows=(1,)))
    path = tmp_path / "gpu.json"
    report = gpu.main(["--dry-run", "--seconds", "3600", "--json", str(path), "--only", *QUICK])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report, default=str))
    assert list(report["lines"]) == QUICK
    for name, outcome in report["lines"].items():
        assert "result" in outcome, (name, outcome)
    failed = [
        (name, key, value)
        for name, outcome in report["lines"].items()
        for key, values in outcome["result"].items()
        for value in (values if isinstance(values, list) else [values])
        if isinstance(value, str) and value != "needs CUDA"
    ]
    assert failed == []


def test_a_line_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sizes: gpu.Sizes) -> gpu.Result:
        raise ZeroDivisionError("no")

    tried: list[str] = []

    def fine(sizes: gpu.Sizes) -> gpu.Result:
        tried.append("fine")
        return {"value": 1}

    monkeypatch.setattr(gpu, "LINES", {"broken": (broken, 9), "fine": (fine, 9)})
    arguments = ["--dry-run", "--json", str(tmp_path / "gpu.json")]
    for _ in range(2):  # the second time only what is missing
        lines = gpu.main(arguments)["lines"]
        assert lines["broken"]["failed"] == "ZeroDivisionError: no"
        assert lines["fine"]["result"] == {"value": 1}
    assert tried == ["fine"]
    gpu.main([*arguments, "--only", "fine"])
    assert tried == ["fine"] * 2


def test_a_script_is_stopped_while_it_saves(encoded: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(shutil.copytree(encoded, tmp_path / "b"))}
    line = (
        f"base_train --device cpu --corpus {tiny_runs.corpus(encoded)} --depth 1 --head-dim 64 "
        "--context-length 64 --total-batch-size 512 --num-steps 999999 --save-every 2 "
        "--eval-every 0 --eval-tokens 512"
    )
    stopped = gpu.script(line, environment, functools.partial(gpu.saving, environment))
    assert stopped["exit"] == 143, stopped
    assert "stopped after step" in stopped["said"][-1]
    assert "said" not in gpu.in_short({"base": stopped})["base"]


def test_a_table_shows_what_failed() -> None:
    failed = {"exit": 1, "seconds": 1.23456, "said": ["error: no"]}
    assert gpu.in_short({"mid": failed})["mid"] == {**failed, "seconds": 1.235}


def test_contention_measures_what_is_left_of_the_speed() -> None:
    result = contention.main(contention.Config((), ("decode",), rounds=1, seconds=0.05))
    assert result.keys() == {"decode, one_thread"}
    for cases in result.values():
        assert cases.keys() == {"alone", "busy", "two"}
        assert all(rate > 0 for rates in cases.values() for rate in rates)


def test_imports_of_a_script_are_timed() -> None:
    assert "torch" in startup.imports("scripts.chat_cli", 3)
