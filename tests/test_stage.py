"""Frame of every stage's loop: set-up, resuming with other settings, logging."""

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import list_steps, read_meta
from nanochat.errors import UserError
from nanochat.infer.samples import QUESTIONS
from nanochat.stage import Stage
from nanochat.tokenizer import Tokenizer


@pytest.fixture
def folder(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "base"))


@pytest.fixture
def run(encoded: Path, folder: Path) -> Callable[..., Stage]:
    """Run base training (or another stage) with changed settings."""

    def go(stage: str = "base", **changes: Any) -> Stage:
        config = tiny_runs.CONFIGS[stage](tiny_runs.corpus(encoded))
        config = tiny_runs.changed(config, evaluating={"eval_every": 0, "eval_tokens": 128})
        config = tiny_runs.changed(config, **{"duration": {"num_steps": 4}, **changes})
        return tiny_runs.train(stage, folder, config)

    return go


def records(folder: Path, stage: str = "base", tag: str = "default") -> list[dict[str, Any]]:
    path = folder / "runs" / f"{stage}-{tag}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(folder: Path, stage: str = "base") -> list[int]:
    return list_steps(folder / "checkpoints" / stage / "default")


def test_a_run_logs_evaluates_samples_and_saves(run: Callable[..., Stage], folder: Path) -> None:
    stage = run(evaluating={"eval_every": 2})
    assert stage.finished
    assert stage.state.step == stage.plan.num_steps == 4
    log = records(folder)
    assert [r["step"] for r in log if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in log if r["kind"] == "eval"] == [0, 2, 4], "start, schedule, end"
    assert [r["step"] for r in log if r["kind"] == "sample"] == [4] * 4
    start, end = log[0], log[-1]
    assert (start["kind"], end["kind"]) == ("start", "end")
    assert start["plan"]["num_steps"] == 4
    assert end["tokens"] == 4 * 512
    assert end["bpb"] == [r["bpb"] for r in log if r["kind"] == "eval"][-1]
    lr = [r["lr"] for r in log if r["kind"] == "train"]
    assert lr == [stage.plan.hypers(step).lr_multiplier for step in range(4)]
    assert steps(folder) == [2, 4]
    meta = read_meta(folder / "checkpoints" / "base" / "default" / "step_000004")
    evaluated = {r["step"]: r["bpb"] for r in log if r["kind"] == "eval"}
    assert meta["train_state"]["metrics"]["bpb"] == evaluated[2], (
        "it was saved before it was measured"
    )
    assert meta["run_config"]["depth"] == 2


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_chat_stages_log_answers(stage: str, run: Callable[..., Stage], folder: Path) -> None:
    run(duration={"num_steps": 1})
    sampling = {"eval_every": 0, "sample_every": 2}
    run(stage, source="base", duration={"num_steps": 3}, evaluating=sampling)
    samples = [r for r in records(folder, stage) if r["kind"] == "sample"]
    assert [r["step"] for r in samples] == [2] * 3 + [3] * 3
    assert [r["prompt"] for r in samples] == list(QUESTIONS) * 2
    assert all(r["text"].startswith("\n") for r in samples)


def test_an_evaluation_reads_a_row_at_least(run: Callable[..., Stage], folder: Path) -> None:
    measured = []
    for tokens in (1, 64, 10**9):  # a row has 64 tokens
        run(run={"tag": str(tokens)}, evaluating={"eval_tokens": tokens}, duration={"num_steps": 1})
        log = records(folder, tag=str(tokens))
        measured.append([r["bpb"] for r in log if r["kind"] == "eval"])
    assert measured[0] == measured[1] != measured[2]
    assert len(measured[0]) == 2


def test_a_tag_that_is_in_use_needs_resume(run: Callable[..., Stage], folder: Path) -> None:
    run()
    with pytest.raises(UserError, match=r"already holds step_000004; continue it with --resume"):
        run()
    run(run={"tag": "other"})
    assert records(folder, tag="other")[-1]["kind"] == "end"
    before = records(folder)
    assert run(run={"resume": True}).finished
    assert records(folder) == before, "a finished run is left alone"


def test_a_fresh_start_begins_its_log_anew(run: Callable[..., Stage], folder: Path) -> None:
    """A run that was killed before its first checkpoint left a few lines."""
    path = folder / "runs" / "base-default" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"kind": "train", "step": 1, "loss": 99.0}\n')
    run(run={"resume": True})
    assert all(r["loss"] < 90 for r in records(folder) if r["kind"] == "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"another model: it has .*n_layer.*resume with the same model flags"),
        ({"context_length": 32}, "another model"),
        ({"depth": 3}, r"a rule of this version differs: .* with scripts.mid_train"),
        (
            {"learning": {"matrix_optimizer": "lion"}},
            "--matrix-optimizer muon, not of lion; resume with --matrix-optimizer muon",
        ),
        ({"run": {"resume": True, "seed": 5}}, r"data position is for seed = 1337"),
        ({"batching": {"window": 8}}, r"data position is for window_size"),
    ],
)
def test_resuming_with_other_settings_is_a_user_error(
    change: dict[str, Any], message: str, run: Callable[..., Stage]
) -> None:
    run()
    with pytest.raises(UserError, match=message):
        run(**{"run": {"resume": True}, **change})


def test_resuming_with_another_tokenizer_is_a_user_error(
    run: Callable[..., Stage], folder: Path
) -> None:
    run()
    shutil.rmtree(folder / "checkpoints" / "base" / "default" / "step_000004")
    with tiny_runs.base_dir(folder):
        shutil.rmtree(folder / "tokenizer")
        Tokenizer.train(["another text"], 300).save()
    with pytest.raises(UserError, match="tokenizer"):
        run(run={"resume": True})


def test_a_chosen_batch_is_kept_when_a_run_goes_on(
    run: Callable[..., Stage], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` depends on the number of ranks: the checkpoint says what it was."""
    auto = {"total_batch_size": "auto"}
    monkeypatch.setattr("nanochat.plan.scaled_batch_size", lambda *_: 512)
    first = run(batching=auto)
    shutil.rmtree(folder / "checkpoints" / "base" / "default" / "step_000004")
    monkeypatch.setattr("nanochat.plan.scaled_batch_size", lambda *_: 1024)
    again = run(run={"resume": True}, batching=auto)
    assert again.plan.total_batch_size == first.plan.total_batch_size == 512


def test_a_later_stage_takes_steps_as_large_as_those_of_its_source(
    run: Callable[..., Stage],
) -> None:
    run()
    for stage in ("mid", "sft"):
        later = run(stage, batching={"total_batch_size": "auto"}, duration={"num_steps": 1})
        assert later.plan.total_batch_size == 512


def test_another_batch_may_be_chosen(
    run: Callable[..., Stage], folder: Path, encoded: Path
) -> None:
    """The position counts rows: the second half of the run takes larger steps."""
    run()
    shutil.rmtree(folder / "checkpoints" / "base" / "default" / "step_000004")
    stage = run(run={"resume": True}, batching={"total_batch_size": 1024})
    assert stage.state.tokens == 2 * 512 + 2 * 1024
    assert [r["targets"] for r in records(folder) if r["kind"] == "train"][-1] > 600


def test_max_hours_saves_and_stops(run: Callable[..., Stage], folder: Path) -> None:
    stage = run(saving={"max_hours": 1e-9, "save_every": 0})
    assert not stage.finished
    assert steps(folder) == [stage.state.step]
    assert stage.state.step < 4
    assert records(folder)[-1]["kind"] == "train"
    assert run(run={"resume": True}).finished
    assert sorted(tiny_runs.losses(folder, "base")) == [1, 2, 3, 4]


def test_a_save_that_failed_ends_the_run_at_the_next_step(
    run: Callable[..., Stage], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    record = Stage.record

    def later(stage: Stage, *arguments: Any) -> None:
        """The writer is done before a step is over."""
        while stage.checkpoints.busy:
            time.sleep(0.001)
        record(stage, *arguments)

    monkeypatch.setattr(Stage, "record", later)
    monkeypatch.setattr(checkpoint_manager, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        run(saving={"save_every": 2}, duration={"num_steps": 50})
    assert [r["step"] for r in records(folder) if r["kind"] == "train"] == [1, 2, 3]
    with pytest.raises(OSError, match="No space left"):  # the last save
        run(run={"tag": "other"}, saving={"save_every": 0}, duration={"num_steps": 2})


def test_garbage_collection_is_off_for_what_stays(
    run: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    record, close = Stage.record, Stage.close

    def noted(name: str, action: Any) -> Any:
        def call(stage: Stage, *arguments: Any) -> None:
            action(stage, *arguments)
            calls.append((name, gc.get_freeze_count()))

        return call

    monkeypatch.setattr(Stage, "record", noted("step", record))
    monkeypatch.setattr(Stage, "close", noted("close", close))
    before = gc.get_freeze_count()
    run(duration={"num_steps": 2})
    (_, first), (_, second), (_, after) = calls
    assert first == pytest.approx(second, rel=0.01)
    assert first > before + 10_000
    assert after == 0


def test_a_stage_needs_the_one_before(run: Callable[..., Stage]) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of base .*; train that stage first"):
        run("mid")
    with pytest.raises(UserError, match="no checkpoint of mid"):
        run("sft")


def test_a_corpus_needs_to_be_encoded(run: Callable[..., Stage], tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(UserError, match=r"is not encoded: .* run python -m scripts\.tok_encode"):
        run(corpus=str(tmp_path / "texts"))


def test_stages_name_what_they_started_from(run: Callable[..., Stage], folder: Path) -> None:
    run()
    run("mid")
    newest = folder / "checkpoints" / "mid" / "default" / "step_000004"
    source = read_meta(newest)["source"]
    digest = source.pop("digest")
    assert source == {"stage": "base", "tag": "default", "step": 4}
    assert (
        digest == read_meta(folder / "checkpoints" / "base" / "default" / "step_000004")["digest"]
    )


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_a_run_goes_on_without_what_it_started_from(
    stage: str, run: Callable[..., Stage], folder: Path
) -> None:
    run()
    run(stage, source="base")
    expected = tiny_runs.losses(folder, stage)
    own = folder / "checkpoints" / stage / "default"
    source = read_meta(own / "step_000004")["source"]
    shutil.rmtree(own / "step_000004")
    shutil.rmtree(folder / "checkpoints" / "base")
    assert run(stage, source="base", run={"resume": True}).finished
    assert tiny_runs.losses(folder, stage) == expected
    assert read_meta(own / "step_000004")["source"] == source
    with pytest.raises(UserError, match=r"context of 64 tokens, --context-length is 128"):
        run(stage, source="base", run={"resume": True}, context_length=128)


def test_time_outside_of_steps_is_counted_too(run: Callable[..., Stage], folder: Path) -> None:
    run(evaluating={"eval_every": 2})
    log = records(folder)
    elapsed = [r["elapsed_seconds"] for r in log if r["kind"] in ("train", "end")]
    assert elapsed == sorted(elapsed)
    assert all(r["elapsed_seconds"] > r["seconds"] for r in log if "seconds" in r)
    shutil.rmtree(folder / "checkpoints" / "base" / "default" / "step_000004")
    run(run={"resume": True})
    again = [r["elapsed_seconds"] for r in records(folder)[len(log) :] if r["kind"] == "train"]
    assert again[0] > elapsed[1], "it goes on from the checkpoint's"


def test_starting_from_an_unfinished_run_is_said(
    run: Callable[..., Stage], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    run("mid", duration={"num_steps": 1})
    assert "not finished" not in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints" / "base" / "default" / "step_000004")
    run("mid", run={"tag": "early"}, duration={"num_steps": 1})
    assert "that run is not finished, it is to have 4 steps" in capsys.readouterr().out


def test_sft_trains_on_the_assistant_only(run: Callable[..., Stage], folder: Path) -> None:
    run()
    run("mid")
    run("sft")
    targets = {
        stage: sum(r["targets"] for r in records(folder, stage) if r["kind"] == "train")
        for stage in ("mid", "sft")
    }
    assert 0 < targets["sft"] < 0.7 * targets["mid"]


def test_an_epoch_of_a_stage_is_every_document_once(
    run: Callable[..., Stage], folder: Path
) -> None:
    run()
    epochs = {"num_steps": None, "epochs": 2}
    stage = run("sft", source="base", mix=("arithmetic:40:1",), duration=epochs)
    assert stage.finished
    consumed = records(folder, "sft")[-1]["consumed"]
    assert {name: counts["documents"] for name, counts in consumed.items()} == {"arithmetic": 80}
