"""A run is opened once, saves before it looks, says what changed, and is stopped in the open."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from stores import numbered_store

from nanochat import runtime
from nanochat.checkpoint_manager import (
    check_digests,
    list_steps,
    load_model,
    load_weights,
    read_meta,
)
from nanochat.cli import launch
from nanochat.config import BaseConfig, Learning, RlConfig, check_ranges
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.runtime import Runtime
from nanochat.stage import Stage
from nanochat.tokenizer import Tokenizer
from nanochat.train import NonFiniteWeights


@pytest.fixture
def folder(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "base"))


@pytest.fixture
def run(encoded: Path, folder: Path) -> Callable[..., Any]:
    def go(stage: str = "base", **changes: Any) -> Any:
        config = tiny_runs.CONFIGS[stage](tiny_runs.corpus(encoded))
        config = tiny_runs.changed(config, evaluating={"eval_every": 0, "eval_tokens": 128})
        config = tiny_runs.changed(config, **{"duration": {"num_steps": 4}, **changes})
        return tiny_runs.train(stage, folder, config)

    return go


def checkpoints(folder: Path, stage: str = "base", tag: str = "default") -> Path:
    return folder / "checkpoints" / stage / tag


def log_of(folder: Path, stage: str = "base", tag: str = "default") -> Path:
    return folder / "runs" / f"{stage}-{tag}" / "metrics.jsonl"


RESUME = {"resume": True}


def test_metadata_is_read_once_when_a_stage_resumes(
    run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    run("mid")
    shutil.rmtree(checkpoints(folder, "mid") / "step_000004")
    read: list[Path] = []
    original = Path.read_text

    def counted(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "meta.json" and "checkpoints" in path.parts:
            read.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    run("mid", run=RESUME)
    own = [path for path in read if "mid" in path.parts]
    assert len(own) == 1, own


def test_a_step_comes_back_after_a_kill_between_the_renames(
    run: Callable[..., Any], folder: Path
) -> None:
    run()
    aside = checkpoints(folder) / ".step_000004.abcd1234.tmp"
    aside.mkdir()
    (checkpoints(folder) / "step_000004").rename(aside / "old")
    written = (aside / "old" / "meta.json").stat().st_ino
    (checkpoints(folder) / ".step_000004.tmp").mkdir()  # the new one, killed before it was renamed
    assert run(run=RESUME).finished
    assert sorted(p.name for p in checkpoints(folder).iterdir()) == ["step_000002", "step_000004"]
    assert (checkpoints(folder) / "step_000004" / "meta.json").stat().st_ino == written


def test_a_finished_run_reads_no_data(run: Callable[..., Any], folder: Path) -> None:
    run()
    shutil.rmtree(folder / "stores")
    assert run(run=RESUME).finished


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr_scale", -1.0),
        ("lr_scale", float("nan")),
        ("matrix_lr", float("inf")),
        ("warmup", 2.0),
        ("warmdown", -1.0),
        ("adam_betas", (2.0, 2.0)),
        ("muon_momentum", (5.0, 5.0)),
        ("weight_decay", -1.0),
    ],
)
def test_settings_have_ranges(setting: str, value: Any, run: Callable[..., Any]) -> None:
    flag = "--" + setting.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{flag} \S+ must be from \S+ to \S+$"):
        run(learning={setting: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"duration": {"num_steps": 10**24}},
        {"context_length": 10**9},
        {"batching": {"total_batch_size": 10**20}},
        {"saving": {"keep_last": -1}},
        {"saving": {"max_hours": -1.0}},
    ],
)
def test_no_setting_runs_for_ever(changes: dict[str, Any], run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="must be from"):
        run(**changes)


def test_ranges_are_those_of_the_defaults() -> None:
    for config in (BaseConfig(), tiny_runs.MidConfig(), tiny_runs.SftConfig(), RlConfig()):
        check_ranges(config)
    with pytest.raises(UserError, match="--final-lr"):
        check_ranges(Learning(final_lr=2))


def test_what_changed_is_said_when_a_run_goes_on(
    run: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    shutil.rmtree(checkpoints(folder) / "step_000004")
    capsys.readouterr()
    run(run=RESUME, learning={"matrix_lr": 0.01}, saving={"save_every": 1})
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("changed since")]
    assert lines == ["changed since step 2: --matrix-lr 0.02 -> 0.01"]


def test_a_source_that_moved_on_is_refused(run: Callable[..., Any], folder: Path) -> None:
    """A stage that was trained from a stopped run must not count as finished later."""
    run(duration={"num_steps": 4})
    shutil.rmtree(checkpoints(folder) / "step_000004")
    run("mid")
    run(run=RESUME)
    with pytest.raises(UserError, match=r"from base/default step 2, which has moved on to "):
        run("mid", run=RESUME)
    shutil.rmtree(checkpoints(folder, "mid"))
    assert run("mid", run=RESUME).finished


def test_the_same_tag_is_the_first_source(run: Callable[..., Any], folder: Path) -> None:
    run()
    run(run={"tag": "small"})
    stage = run("mid", run={"tag": "small"})
    assert (stage.run.source["stage"], stage.run.source["tag"]) == ("base", "small")
    assert run("mid").run.source["tag"] == "default"


def test_a_torn_line_of_the_log_is_repaired(run: Callable[..., Any], folder: Path) -> None:
    run()
    shutil.rmtree(checkpoints(folder) / "step_000004")
    path = log_of(folder)
    whole = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "end"]
    path.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:9])
    run(run=RESUME)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-1]["kind"] == "end"
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, 2]


def test_a_resumed_log_evaluates_as_the_uninterrupted_one(
    run: Callable[..., Any], folder: Path
) -> None:
    every = {"eval_every": 2, "eval_tokens": 128}
    run(evaluating=every)
    before = [json.loads(line) for line in log_of(folder).read_text().splitlines()]
    shutil.rmtree(checkpoints(folder) / "step_000004")
    run(run=RESUME, evaluating=every)
    after = [json.loads(line) for line in log_of(folder).read_text().splitlines()]
    added = after[len(before) :]
    assert [r["step"] for r in added if r["kind"] == "eval"] == [4]


def test_a_failing_evaluation_loses_no_step(
    run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import base_train

    evaluate, calls = base_train.evaluate_held_out, []

    def fails_at_the_end(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return evaluate(*arguments)

    monkeypatch.setattr(base_train, "evaluate_held_out", fails_at_the_end)
    with pytest.raises(OSError, match="Input/output"):
        run(saving={"save_every": 0})
    monkeypatch.undo()
    assert run(run=RESUME, saving={"save_every": 0}).finished
    assert list_steps(checkpoints(folder)) == [4]
    kinds = [json.loads(line)["kind"] for line in log_of(folder).read_text().splitlines()]
    assert kinds.count("train") == 4
    assert kinds[-1] == "end"


def test_samples_are_decoration(
    run: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from scripts import base_train

    def broken(*arguments: Any, **options: Any) -> Any:
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    monkeypatch.setattr(base_train, "sample_texts", broken)
    assert run().finished
    assert "note: no samples at step 4" in capsys.readouterr().out


def test_rows_too_short_for_any_sample(run: Callable[..., Any]) -> None:
    assert run(context_length=4).finished


class Narrow:
    """A standard output whose reader has left, or whose encoding lacks a character."""

    encoding = "ascii"

    def __init__(self, error: Exception):
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("no descriptor")


@pytest.mark.parametrize(
    "error",
    [
        UnicodeEncodeError("cp1252", "☃", 0, 1, "no such character"),
        BrokenPipeError(32, "Broken pipe"),
        ValueError("I/O operation on closed file"),
    ],
)
def test_printing_never_ends_a_run(
    error: Exception, run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Narrow(error))
    assert run().finished
    assert list_steps(checkpoints(folder)) == [2, 4]


def test_weights_that_are_not_finite_are_never_saved(
    run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Stage.record

    def spoil(stage: Stage, *arguments: Any) -> None:
        record(stage, *arguments)
        if stage.state.step == 3:
            with torch.no_grad():
                next(iter(stage.model.parameters())).view(-1)[0] = float("nan")

    monkeypatch.setattr(Stage, "record", spoil)
    with pytest.raises(UserError, match=r"step 4: the loss") as caught:
        run(saving={"save_every": 2})
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":  # a process would wait for it at its end
            thread.join()
    assert list_steps(checkpoints(folder)) == [2]
    assert not isinstance(caught.value, NonFiniteWeights)
    with pytest.raises(NonFiniteWeights, match="after step 3 1 tensors"):
        run(run={"tag": "other"}, saving={"save_every": 3})
    assert list_steps(checkpoints(folder, tag="other")) == []


@pytest.mark.parametrize("status", [0, 75, 130, 143])
def test_a_stopped_stage_has_its_exit_status(
    status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def main(cfg: BaseConfig, started: Runtime) -> None:
        started.exit_code = status

    monkeypatch.setattr(sys, "argv", ["base_train", "--device", "cpu"])
    if status == 0:
        launch(main, BaseConfig, None)
        return
    with pytest.raises(SystemExit) as caught:
        launch(main, BaseConfig, None)
    assert caught.value.code == status


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path: Path) -> None:
    program = """
import os, subprocess, sys, time
from nanochat import runtime
if os.fork():  # the launcher: killed a moment later, without a word to its rank
    time.sleep(1.5)
    os._exit(9)
rank = runtime.single()
runtime.watch_parent(rank, patience=60, poll=0.05)
for _ in range(600):
    time.sleep(0.05)
    if rank.stop_signal:
        open(sys.argv[1], "w").write(str(rank.exit_code))
        break
"""
    said = tmp_path / "said"
    subprocess.run([sys.executable, "-c", program, str(said)], check=False, timeout=60)
    for _ in range(300):
        if said.is_file() and said.read_text():
            break
        time.sleep(0.1)
    assert said.read_text() == "143"


def test_a_step_that_is_pruned_while_it_is_read(run: Callable[..., Any], folder: Path) -> None:
    stage = run()
    step = checkpoints(folder) / "step_000002"
    meta, rank = read_meta(step), runtime.single()
    shutil.rmtree(step)
    for read in (
        lambda: read_meta(step),
        lambda: load_weights(step, meta, stage.model, rank),
        lambda: check_digests(step, meta, meta["files"]),
    ):
        with pytest.raises(UserError, match=r"step_000002 is gone: .*--keep-last.*; try again"):
            read()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', "\xff"])
def test_broken_metadata_is_one_line(text: str, run: Callable[..., Any], folder: Path) -> None:
    run()
    newest = checkpoints(folder) / "step_000004"
    (newest / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"meta\.json"):
        run(run=RESUME)
    with tiny_runs.base_dir(folder), pytest.raises(UserError, match=r"meta\.json"):
        load_model("base", runtime.single())


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff", '{"version": "x"}'])
def test_a_broken_tokenizer_is_one_line(text: str, encoded: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(encoded / "tokenizer", tmp_path / "tokenizer"))
    for file in broken.glob("*.json"):
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(broken)


def test_wandb_is_checked_before_anything_else(
    run: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb needs the package wandb"):
        run(run={"wandb": "trial"})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    with pytest.raises(UserError, match="--wandb needs a login"):
        run(run={"wandb": "trial"})
    assert not checkpoints(folder).exists()


def test_max_hours_is_no_success(run: Callable[..., Any]) -> None:
    stage = run(saving={"max_hours": 1e-9})
    assert stage.runtime.exit_code == runtime.TIME_IS_UP
    assert not stage.finished


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_ranks_takes_the_same_rows(world_size: int, tmp_path: Path) -> None:
    """Steps of eight rows; with three or five ranks some have empty rows."""
    store = numbered_store(tmp_path / "s", [5] * 40)
    rows_per_rank = -(-8 // world_size)
    loaders = [
        DataLoader(
            [Source(store)],
            batch_size=min(2, rows_per_rank),
            sequence_length=4,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    count = -(-rows_per_rank // min(2, rows_per_rank))
    alone = DataLoader([Source(store)], batch_size=8, sequence_length=4)
    for _ in range(3):
        batches = [b for loader in loaders for b in loader.step_batches(8, count)]
        assert len({b.inputs.shape for b in batches}) == 1
        rows = torch.cat([b.inputs[b.targets[:, 0] >= 0] for b in batches])
        expected = next(alone)
        assert sorted(rows.tolist()) == sorted(expected.inputs.tolist())
    states = [loader.state_dict() for loader in loaders]
    assert all(state == alone.state_dict() for state in states)
