"""--resume of the evaluations: what is measured is kept, as long as it would come out the same."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from nanochat.config import Computing
from nanochat.errors import UserError
from nanochat.eval.record import Measurement, read_measurements
from nanochat.runtime import single
from scripts import base_eval, chat_eval


@pytest.fixture(scope="module")
def trained(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "base"
    shutil.copytree(encoded, folder)
    config = tiny_runs.base_config(tiny_runs.corpus(encoded), duration={"num_steps": 2})
    tiny_runs.train("base", folder, config)
    return folder


@pytest.fixture
def base(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """The labels of what `module.name` is called for from now on."""
    calls: list[str] = []
    original: Callable[..., Any] = getattr(module, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(keywords.get("label", name))
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, call)
    return calls


def retrain(base: Path, encoded: Path) -> None:
    """The same tag and step, other weights."""
    shutil.rmtree(base / "checkpoints")
    config = tiny_runs.base_config(tiny_runs.corpus(encoded), duration={"num_steps": 2})
    tiny_runs.train("base", base, tiny_runs.changed(config, run={"seed": 5}))


CPU = Computing(device="cpu", dtype="float32")
CHAT = chat_eval.Config(
    run=CPU,
    answering=chat_eval.Answering(max_tokens=3),
    source="base",
    task=("arithmetic:5", "arithmetic:5:level=2"),
    max_problems=2,
    resume=True,
)


def on_record(base: Path) -> list[Measurement]:
    return read_measurements(base / "report" / "eval_base-default.json")


def test_a_finished_task_is_not_measured_again(
    base: Path,
    encoded: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = counted(monkeypatch, chat_eval.Asked, "measure")
    loads = counted(monkeypatch, chat_eval, "load_model")
    first, second = CHAT.task

    def measured(cfg: chat_eval.Config) -> list[str]:
        calls.clear()
        chat_eval.main(cfg, single())
        return list(calls)

    # Interrupted in the second task: the first is on record.
    def interrupt(*_: Any, **keywords: Any) -> dict[str, Any]:
        if keywords["label"] == second:
            raise KeyboardInterrupt
        return task(*_, **keywords)

    task = chat_eval.Asked.measure
    monkeypatch.setattr(chat_eval.Asked, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat_eval.main(CHAT, single())
    monkeypatch.setattr(chat_eval.Asked, "measure", task)
    assert measured(CHAT) == [second]
    whole = on_record(base)
    assert [one["name"] for one in whole] == [first, second]

    loads.clear()
    capsys.readouterr()
    assert measured(CHAT) == []
    out = capsys.readouterr().out
    assert f"{first}: " in out
    assert "kept from an earlier run" in out
    assert not loads, "the model is not needed"
    assert on_record(base) == whole

    assert measured(replace(CHAT, resume=False)) == [first, second]
    assert measured(replace(CHAT, max_problems=3)) == [first, second]
    assert measured(replace(CHAT, max_problems=3, split="val")) == [first, second]
    sampled = answering(num_samples=2, temperature=1.0, pass_at=(1,))
    assert measured(sampled) == [first, second]
    assert measured(sampled) == []
    assert measured(answering(num_samples=2, temperature=1.0, pass_at=(1,), seed=3)) == [
        first,
        second,
    ]
    assert measured(answering(num_samples=2, temperature=1.0, pass_at=(1, 2))) == [first, second]
    assert measured(CHAT) == [], "nothing has taken its place"
    half = replace(single(), dtype=torch.bfloat16)
    chat_eval.main(CHAT, half)
    assert measured(CHAT) == []
    assert len(on_record(base)) == 2 * 6
    retrain(base, encoded)
    assert measured(replace(CHAT, task=(first,))) == [first]
    assert [one["name"] for one in on_record(base)] == [first], "the others were of other weights"


def answering(**changes: Any) -> chat_eval.Config:
    return replace(CHAT, answering=replace(CHAT.answering, **changes))


def test_base_eval_keeps_what_it_knows(
    base: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = counted(monkeypatch, base_eval, "bits_per_byte")
    core = counted(monkeypatch, base_eval, "evaluate_core")
    loads = counted(monkeypatch, base_eval, "load_model")
    text_file = tmp_path / "held out.txt"
    text_file.write_text("the king gave bread by the sea.")
    cfg = base_eval.Config(
        run=CPU,
        corpus=tiny_runs.corpus(encoded),
        eval_tokens=128,
        batch_size=1,
        resume=True,
    )

    def measured(cfg: base_eval.Config) -> tuple[int, int, int]:
        for calls in (text, core, loads):
            calls.clear()
        values = base_eval.main(cfg, single())
        known = on_record(base)
        assert all(one in known for one in values)
        return len(text), len(core), len(loads)

    assert measured(cfg) == (2, 0, 1)
    assert measured(cfg) == (0, 0, 0)
    assert measured(replace(cfg, resume=False)) == (2, 0, 1)
    before = on_record(base)
    assert measured(replace(cfg, eval_tokens=256)) == (2, 0, 1)
    assert measured(cfg) == (0, 0, 0), "nothing has taken its place"
    kinds = [(one["kind"], one["name"]) for one in on_record(base)]
    both = [("bpb", "train"), ("bpb", "val")]
    assert kinds == [*both, ("samples", "samples"), *both]
    assert on_record(base)[:3] == before
    assert measured(replace(cfg, text=text_file)) == (0, 0, 1)
    assert measured(replace(cfg, text=text_file)) == (0, 0, 0)
    text_file.write_text("the king gave bread by the sea, twice.")
    assert measured(replace(cfg, text=text_file)) == (0, 0, 1)

    bundle = base / "eval_bundle"
    data = bundle / "eval_data"
    data.mkdir(parents=True)
    entries = "".join(
        f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [0], "
        "icl_task_type: language_modeling}\n"
        for label in ("one", "two")
    )
    (bundle / "core.yaml").write_text(f"icl_tasks:\n{entries}")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\none,0\ntwo,0\n")
    item = json.dumps({"context": "the king", "continuation": "gave"})
    (data / "one.jsonl").write_text(item)

    def scores() -> list[tuple[str, Any]]:
        return [
            (next(key for key in ("core", "core_partial") if key in one["result"]), limit)
            for one in on_record(base)
            if one["kind"] == "core" and (limit := one["settings"]["max_per_task"]) != 0
        ]

    assert measured(cfg) == (0, 1, 1), "the bundle is new"
    assert scores() == [("core_partial", None)]
    assert measured(cfg) == (0, 0, 0)
    (data / "two.jsonl").write_text(item)
    assert measured(cfg) == (0, 1, 1), "it is complete now"
    assert scores() == [("core", None)]
    quick = replace(cfg, metric=replace(cfg.metric, max_per_task=1))
    assert measured(quick) == (0, 1, 1)
    assert scores() == [("core", None), ("core", 1)], "a quick look replaces nothing"
    assert measured(cfg) == (0, 0, 0)
    (data / "two.jsonl").unlink()
    assert measured(cfg) == (0, 1, 1)
    assert scores() == [("core", 1), ("core_partial", None)], "the whole is gone with its files"
    assert measured(replace(cfg, metric=replace(cfg.metric, core="no"))) == (0, 0, 0)
    retrain(base, encoded)
    assert measured(cfg) == (2, 1, 1)


def test_core_is_fetched_where_it_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(url: str) -> Path:
        asked.append(url)
        raise UserError("no network")

    monkeypatch.setattr(base_eval, "fetch_bundle", fetch)
    metric = base_eval.Core(bundle_url="http://here/x.zip")
    assert base_eval.core_bundle(metric, single()) is None
    assert asked == []

    def main(**changes: Any) -> None:
        base_eval.main(base_eval.Config(run=CPU, metric=replace(metric, **changes)), single())

    for wanted in ({"core": "yes"}, {"hf": "somebody/model"}):
        with pytest.raises(UserError, match="no network"):
            main(**wanted)
    assert asked == [metric.bundle_url] * 2
    with pytest.raises(UserError, match=r"--bundle .*nowhere is no folder"):
        main(bundle=tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing would be measured"):
        main(hf="somebody/model", core="no")
