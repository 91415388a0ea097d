"""The record of measurements: keyed by all that says what was measured, and read by people."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nanochat.eval import record as records
from nanochat.eval.record import (
    CHAT_CORE,
    chat_core,
    chat_core_texts,
    compare,
    evaluation_path,
    find,
    labels,
    of_checkpoint,
    read_measurements,
    record,
    to_show,
)
from nanochat.eval.results import mcnemar, task_result
from tasks import registry

META: dict[str, Any] = {"stage": "sft", "tag": "x", "step": 8}
WHOLE: dict[str, Any] = {
    "split": "test",
    "problems": 40,
    "of": 40,
    "shots": 0,
    "digest": "a",
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def known() -> list[tuple[str, float]]:
    return [(one["name"], one["result"]["accuracy"]) for one in of_checkpoint(META)]


def test_another_setting_is_another_measurement_and_the_same_ones_replace() -> None:
    record(META, "task", "gsm8k", WHOLE, task_result(10, 40, 0.0))
    for settings in (
        {**WHOLE, "split": "train"},
        {**WHOLE, "problems": 20},
        {**WHOLE, "digest": "b"},
        {**WHOLE, "shots": 8},
        {**WHOLE, "num_samples": 4, "temperature": 0.8},
    ):
        total = int(settings["problems"])
        record(META, "task", "gsm8k", settings, task_result(total / 2, total, 0.0))
    assert known() == [("gsm8k", 0.25)] + [("gsm8k", 0.5)] * 5
    record(META, "task", "gsm8k", WHOLE, task_result(30, 40, 0.0))
    assert sorted(known()) == [("gsm8k", 0.5)] * 5 + [("gsm8k", 0.75)]
    told = labels(of_checkpoint(META))
    assert len(set(told)) == 6
    assert "gsm8k, split train" in told
    assert "gsm8k, 20 of 40 problems" in told
    assert "gsm8k, 8 shots" in told
    assert "gsm8k, 4 samples, temperature 0.8" in told
    assert {"gsm8k, digest a", "gsm8k, digest b"} <= set(told), "alike but for the rows"


def test_checkpoints_are_kept_apart() -> None:
    def of(step: int, sha: str) -> dict[str, Any]:
        return {**META, "step": step, "files": {"model.safetensors": {"sha256": sha}}}

    record(of(8, "one"), "task", "gsm8k", WHOLE, task_result(10, 40, 0.0))
    record(of(4, "old"), "task", "gsm8k", WHOLE, task_result(20, 40, 0.0))
    assert [one["result"]["correct"] for one in of_checkpoint(of(8, "one"))] == [10]
    assert [one["result"]["correct"] for one in of_checkpoint(of(4, "old"))] == [20]
    assert of_checkpoint(of(8, "two")) == []
    record(of(8, "two"), "task", "mmlu", WHOLE, task_result(30, 40, 0.0))
    assert of_checkpoint(of(8, "one")) == [], "those weights are no more"
    assert len(of_checkpoint(of(4, "old"))) == 1


def test_a_quick_look_never_hides_the_whole() -> None:
    record(META, "task", "gsm8k", WHOLE, task_result(10, 40, 0.0))
    quick = {**WHOLE, "problems": 4, "digest": "of the four"}
    record(META, "task", "gsm8k", quick, task_result(4, 4, 0.0))
    record(META, "task", "gsm8k", {**quick, "split": "train"}, task_result(4, 4, 0.0))
    record(META, "task", "mmlu", quick, task_result(4, 4, 0.0))
    shown = to_show(of_checkpoint(META))
    assert labels(shown) == [
        "gsm8k",
        "gsm8k, split train, 4 of 40 problems",
        "mmlu, 4 of 40 problems",
    ]


def test_chat_core_is_of_a_whole_set() -> None:
    sizes = {name: size or 256 for name, size in CHAT_CORE["nanochat's tasks"].items()}

    def measure(name: str, total: int, accuracy: float, **changes: Any) -> None:
        settings = {**WHOLE, "problems": total, "of": total, "max_tokens": 512, **changes}
        record(META, "task", name, settings, task_result(accuracy * total, total, 0.0))

    def scored() -> tuple[float, int]:
        return chat_core(of_checkpoint(META), sizes)

    measure("gsm8k", 6, 0.9)
    measure("gsm8k", sizes["gsm8k"], 0.9, split="train")
    measure("gsm8k", sizes["gsm8k"], 0.9, shots=8)
    measure("gsm8k", sizes["gsm8k"], 0.9, temperature=1.0)
    measure("gsm8k", sizes["gsm8k"], 0.9, max_tokens=16)
    measure("arithmetic:level=2", 256, 0.9)
    score, counted = scored()
    assert counted == 0
    assert math.isnan(score)
    assert chat_core_texts(of_checkpoint(META)) == {}
    for number, (name, size) in enumerate(sizes.items()):
        measure(name, size, number / 10)
        score, counted = scored()
        assert counted == number + 1
        assert score == pytest.approx(sum(k / 10 for k in range(number + 1)) / (number + 1))
        text = chat_core_texts(of_checkpoint(META))["ChatCORE of nanochat's tasks"]
        assert text == f"{score:.4f}" + (f", partial ({counted} of 6)" if counted < 6 else "")


def test_sets_are_of_tasks_that_there_are() -> None:
    for tasks in CHAT_CORE.values():
        assert set(tasks) <= set(registry.EVALUATED)
    for name in CHAT_CORE["generated tasks"]:
        assert len(registry.build(name, "test")) > 100
    assert len(registry.build("arithmetic", "test")) == CHAT_CORE["generated tasks"]["arithmetic"]


def test_stages_are_compared_on_the_same_problems() -> None:
    lines = [{"problem": i, "right": int(i < 6)} for i in range(10)]
    others = [{"problem": i, "right": int(2 < i < 9)} for i in range(10)]
    mid = {**META, "stage": "mid"}
    before = record(mid, "task", "gsm8k", WHOLE, task_result(6, 10, 0.0), lines)
    after = record(META, "task", "gsm8k", WHOLE, task_result(6, 10, 0.0), others)
    assert compare(before, after) == {"gained": 3, "lost": 3, "p": 1.0}
    assert find(of_checkpoint(mid), "task", "gsm8k", WHOLE) == before
    train = {**WHOLE, "split": "train"}
    other = record(META, "task", "gsm8k", train, task_result(6, 10, 0.0), others)
    assert compare(before, other) is None
    assert other["problems"] != after["problems"]
    short = record(META, "task", "gsm8k", WHOLE, task_result(6, 10, 0.0), others[:5])
    assert compare(before, short) is None
    records.problems_path(before).unlink()
    assert compare(before, after) is None


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(5000, 5400) == pytest.approx(math.erfc((400 - 1) / math.sqrt(10400 * 2)), 0.01)


def test_a_torn_record_is_begun_anew_and_odd_entries_are_left_out(base: Path) -> None:
    path = evaluation_path("sft", "x")
    path.parent.mkdir(parents=True)
    path.write_text('{"measured": [{"kind": "task"')
    assert of_checkpoint(META) == []
    with pytest.raises(ValueError, match="line 1"):
        read_measurements(path)
    record(META, "task", "gsm8k", WHOLE, task_result(1, 2, 0.0))
    content = json.loads(path.read_text())
    content["measured"] += [3, {}, {"kind": "task", "name": 4, "settings": {}, "result": {}}]
    path.write_text(json.dumps(content))
    assert known() == [("gsm8k", 0.5)]
