"""scripts.plan: the same flags as the stage's own script, and every line that is promised."""

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tiny_runs

from nanochat.cli import parse
from nanochat.config import BaseConfig, MidConfig, RlConfig, SftConfig
from nanochat.errors import UserError
from nanochat.hardware import GPUS
from nanochat.runtime import single
from scripts.plan import CONFIGS, Hardware, main, stage_asked_for


@pytest.fixture(autouse=True)
def no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


def plan(line: str) -> dict[str, Any]:
    argv = line.split()
    return main(parse(CONFIGS[stage_asked_for(argv)], argv), single())


def test_every_line_that_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan("--depth 20 --gpus 8 --gpu h100")
    said = capsys.readouterr().out
    for line in (
        "parameters (embedding ",
        "block_matrices ",
        "FLOPs per token",
        "steps x ",
        "micro-batches x 8 ranks",
        "weights",
        "gradients",
        "optimizer shard",
        "activations",
        "logits chunk",
        "gradients of a compiled pass",
        "attention accumulators",
        "communication buffers",
        "CUDA context",
        "key/value cache",
        "largest device_batch_size that fits 67.1 GiB: ",
        "shards of climbmix",
        "of the peak of 8 x h100, cost ",
    ):
        assert line in said, line
    assert json.loads(json.dumps(result))["memory"]["total"] < result["memory_limit"]
    assert result["hours"] == pytest.approx(result["flops"] / (989e12 * 8 * 0.4) / 3600)
    assert result["cost"] == pytest.approx(result["hours"] * 8 * 3)
    assert result["device_batch_size"] <= result["largest_device_batch_size"]


def test_the_plan_is_that_of_the_matrix_optimizer() -> None:
    def of(kind: str) -> dict[str, Any]:
        return plan(f"--depth 4 --gpus 1 --matrix-optimizer {kind}")

    adamw, lion = of("adamw")["memory"], of("lion")["memory"]
    matrices = of("muon")["parameters"]["block_matrices"]
    for kind in ("optimizer shard", "total"):
        assert adamw[kind] - lion[kind] == 4 * matrices


def test_every_kind_of_gpu_is_in_the_table() -> None:
    names = get_args(get_type_hints(Hardware)["gpu"])
    assert set(names) - {"cpu"} <= {name.lower() for name in GPUS}
    for name in ("t4", "5090"):
        result = plan(f"--depth 4 --gpus 1 --gpu {name}")
        assert result["memory_limit"] == int(0.9e9 * {"t4": 16, "5090": 32}[name])
        assert result["price"] > 0
    assert plan("--depth 4 --gpus 1 --gpu t4 --price-per-hour 2")["price"] == 2


def test_what_only_a_gpu_needs_is_planned() -> None:
    half, single_precision = (
        plan(f"--depth 4 --gpus 1 --gpu t4 --dtype {dtype} --device-batch-size 4")["memory"]
        for dtype in ("float16", "float32")
    )
    assert half["gradients of a compiled pass"] == half["gradients"]
    assert half["communication buffers"] == 0
    assert half["attention accumulators"] > 0
    # One mask for each of two window sizes, and one in the dtype: 4 x 2048 x 2048 times 6 bytes.
    assert single_precision["attention masks"] == 4 * 2048**2 * 6
    assert half["attention masks"] == 4 * 2048**2 * 4, "a T4 has no varlen attention"
    assert "attention masks" not in plan("--depth 4 --gpus 1 --gpu h100")["memory"]
    assert "CUDA context" not in plan("--depth 2 --context-length 64 --gpu cpu")["memory"]


def test_less_memory_means_fewer_rows() -> None:
    shape = "--depth 12 --gpus 1 --context-length 1024"
    roomy = plan(f"{shape} --gpu h200")
    tight = plan(f"{shape} --gpu l4")
    again = plan(f"{shape} --gpu l4 --recompute")
    rows = [r["largest_device_batch_size"] for r in (tight, again, roomy)]
    assert rows == sorted(rows)
    assert rows[0] < rows[1]
    for result in (roomy, tight, again):
        assert result["memory"]["total"] <= result["memory_limit"]
    with pytest.raises(UserError, match=r"not even one row of 1024 tokens fits .* --recompute"):
        plan(f"{shape} --gpu-memory 1")


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_later_stages_from_a_depth(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(f"--stage {stage} --depth 12 --num-steps 100 --total-batch-size 524288")
    assert result["tokens"] == 100 * 524288
    assert result["weight_decay"] == 0, "as in the stage's own configuration"
    assert f"no checkpoint of {'base' if stage == 'mid' else 'mid'}: planned for --depth 12" in (
        capsys.readouterr().out
    )
    longer = plan(f"--stage {stage} --depth 12 --num-steps 100 --context-length 8192")
    assert longer["sequence_length"] == 8192
    with pytest.raises(UserError, match=rf"--stage {stage} needs --num-steps or --target-tokens"):
        plan(f"--stage {stage} --depth 12")


def test_reinforcement_learning(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--stage rl --depth 12 --num-steps 50 --gpus 2 --group-size 8 --prompts-per-step 16"
    result = plan(line)
    assert result["num_steps"] == 50
    assert result["total_batch_size"] == 16 * 8 * 2048, "a row for each answer at most"
    cache = result["memory"]["rollouts: key/value cache"]
    assert cache == 64 * result["kv_cache_per_chat"]
    twice = plan(f"{line} --max-slots 128")["memory"]
    assert twice["rollouts: key/value cache"] == 2 * cache
    said = capsys.readouterr().out
    for kind in ("rollouts: decoder's weights", "evaluation: KL's reference model", "take turns"):
        assert kind in said
    weights = result["memory"]["weights"]
    spelling = 4 * 256 * 16 * 768  # the decoder adds it to its embedding
    decoder = (weights - spelling) // 2
    assert result["memory"]["rollouts: decoder's weights"] == decoder, "in bfloat16"
    assert result["memory"]["evaluation: KL's reference model"] == weights


def test_rollouts_and_learning_take_turns() -> None:
    """The total is of the one that needs more."""
    line = "--stage rl --depth 4 --num-steps 50 --gpus 1 --device-batch-size 8 --max-slots"
    few, many = (plan(f"{line} {slots}")["memory"] for slots in (1, 2048))
    kept = ("weights", "gradients", "optimizer shard", "logits chunk", "checkpoint copy", "runtime")
    kept = (*kept, "communication buffers", "CUDA context")
    rollouts = ("rollouts: decoder's weights", "rollouts: key/value cache")
    assert few["total"] == sum(v for k, v in few.items() if ":" not in k and k != "total")
    assert many["total"] == sum(many[kind] for kind in (*kept, *rollouts))
    preferences = plan(f"{line} 2048 --algo dpo")
    assert preferences["memory"] == {k: v for k, v in few.items() if ":" not in k}
    assert preferences["total_batch_size"] == 16 * 2 * 2048, "two answers to each prompt"


def test_reinforcement_learning_needs_steps() -> None:
    with pytest.raises(UserError, match="--stage rl needs --num-steps"):
        plan("--stage rl")


def test_the_model_of_a_checkpoint(encoded: Path, tmp_path: Path) -> None:
    config = tiny_runs.base_config(tiny_runs.corpus(encoded), duration={"num_steps": 1})
    for name in ("tokenizer", "stores"):
        (tmp_path / name).symlink_to(encoded / name)
    trained = tiny_runs.train("base", tmp_path, config)
    result = plan("--stage mid --num-steps 5 --gpu cpu")
    assert result["parameters"] == trained.plan.parameters
    assert result["model"].endswith("step_000001")
    assert result["sequence_length"] == 64
    assert result["world_size"] == 1
    assert result["total_batch_size"] == 512, "as many as the run it starts from"
    longer = plan("--stage mid --num-steps 5 --gpu cpu --context-length 192")
    assert longer["total_batch_size"] == 384, "in whole rows"


def test_flags_are_those_of_the_stages() -> None:
    for stage, config in {
        "base": BaseConfig, "mid": MidConfig, "sft": SftConfig, "rl": RlConfig
    }.items():  # fmt: skip
        assert issubclass(CONFIGS[stage], config)
        assert parse(CONFIGS[stage], []).stage == stage
        own = {f.name for f in dataclasses.fields(CONFIGS[stage])}
        assert {f.name for f in dataclasses.fields(config)} <= own
    assert stage_asked_for(["--depth", "4"]) == "base"
    assert stage_asked_for(["--depth", "4", "--stage=rl"]) == "rl"


def test_one_value_for_shell_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--depth 4 --gpus 1 --print num_shards")
    assert int(capsys.readouterr().out) >= 8
    with pytest.raises(UserError, match=r"--print nothing: choose one of .*num_shards"):
        plan("--depth 4 --print nothing")
    with pytest.raises(UserError, match="--gpus 0 must be at least 1"):
        plan("--gpus 0")


def test_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The profile of a node: 4 stages' checkpoints with optimizer state, and one being written."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "not" / "there"))
    line = "--depth 20 --gpus 8"
    result = plan(f"{line} --keep-last 1")
    checkpoint = result["memory"]["weights"] + 8 * result["memory"]["optimizer shard"]
    disk = result["disk"]
    assert disk["checkpoints"] == 5 * checkpoint
    assert 100e9 < disk["total"] < 115e9
    assert "disk: 107 GB (checkpoints 76, text 12, tokens 13, tasks 6" in capsys.readouterr().out
    assert plan(line)["disk"]["checkpoints"] == 9 * checkpoint
    one = plan("--stage mid --depth 20 --num-steps 9 --gpus 8")["disk"]
    assert one == {"checkpoints": 3 * checkpoint, "total": 3 * checkpoint}

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size))

    free(disk["total"])
    plan(f"{line} --keep-last 1 --check-disk")
    free(90e9)
    expected = rf"about 107 GB more \(checkpoints 76, .*\), and {tmp_path} has 90 GB free: free"
    with pytest.raises(UserError, match=expected):
        plan(f"{line} --keep-last 1 --check-disk")
    # What is there already is not needed again.
    monkeypatch.setattr("scripts.plan._size", lambda folders: 10e9 * len(list(folders)))
    plan(f"{line} --keep-last 1 --check-disk")


def test_shards_hold_the_tokens_whatever_the_tokenizer() -> None:
    """Tokens of 4.8 characters are the longest that are expected; a tenth more is downloaded."""
    result = plan("--depth 20 --gpus 8")
    characters = result["num_shards"] * 250e6
    assert 1.1 <= characters / (4.8 * result["tokens"]) < 1.12


@pytest.mark.parametrize("corpus", ["--corpus ./my_texts", "--corpus bbe", "--mix climbmix bbe"])
def test_shards_of_unknown_size_are_not_counted(
    corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(f"--depth 4 --gpus 1 {corpus} --print num_shards")
    assert capsys.readouterr().out == "None\n"
