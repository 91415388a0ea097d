"""The report says what the files say, names what is missing, and never runs what it was given."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanochat import paths
from nanochat.errors import UserError
from nanochat.eval.record import evaluation_path, record
from nanochat.eval.results import task_result
from nanochat.report import sections as report
from nanochat.report.blocks import Plot, Quote, Section, Table, Text, count_text, duration_with_unit
from nanochat.report.material import collect, read_run
from nanochat.report.plots import axis_ticks, plot_svg, smoothed, thinned
from nanochat.report.sections import compose
from nanochat.runtime import single
from scripts import report as script

TOKENS = 1000  # a step


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def start(stage: str = "base", step: int = 0, **runtime: Any) -> dict[str, Any]:
    return {
        "kind": "start",
        "stage": stage,
        "tag": "x",
        "step": step,
        "time": 1_700_000_000.0,
        "model": {"n_layer": 4, "n_embd": 256, "windows": [128, 0]},
        "plan": {
            "num_steps": 8,
            "tokens": 8 * TOKENS,
            "flops": 8e12,
            "total_batch_size": TOKENS,
            "parameters": {"embedding": 1_000, "block_matrices": 234},
        },
        "runtime": {"device": "cpu", "dtype": "bfloat16", "torch": "2.13", **runtime},
    }


def train(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 1.0,
        "tokens": step * TOKENS,
        "tokens_per_second": 500.0,
        "seconds": 2.0 * step,
        "memory_bytes": 2**30,
        **more,
    }


def end(step: int = 8) -> dict[str, Any]:
    return {
        "kind": "end",
        "step": step,
        "seconds": 1800.0,
        "elapsed_seconds": 2400.0,
        "tokens": step * TOKENS,
        "peak_memory_bytes": 3 * 2**30,
        "consumed": {
            "text": {"documents": 30, "tokens": 6000},
            "gsm8k": {"documents": 10, "tokens": 2000},
        },
    }


def write_run(base: Path, name: str, records: list[Any]) -> Path:
    path = base / "runs" / name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def whole_run(stage: str) -> list[dict[str, Any]]:
    records = [start(stage)]
    for step in range(1, 9):
        records.append(train(step, 5.0 - step / 4))
        if step % 4 == 0:
            records.append({"kind": "eval", "step": step, "bpb": 2.0 - step / 10, "user": 3.5})
    sample = {"kind": "sample", "step": 8, "prompt": "In the", "text": "beginning"}
    return [*records, sample, end()]


def tables(sections: list[Section]) -> list[Table]:
    return [b for section in sections for b in section.blocks if isinstance(b, Table)]


def note(
    stage: str, kind: str, name: str, result: dict[str, Any], step: int = 8, **settings: Any
) -> None:
    record({"stage": stage, "tag": "x", "step": step}, kind, name, settings, result)


def row(sections: list[Section], name: str) -> list[str]:
    found = [r[1:] for table in tables(sections) for r in table.rows if r[0] == name]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


class Page(HTMLParser):
    """Checks that tags nest, and collects what matters."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_recorded_is_in_both_reports(base: Path) -> None:
    for stage in ("base", "mid", "sft", "rl"):
        write_run(base, f"{stage}-x", whole_run(stage))
        whole = {"split": "test", "problems": 40, "of": 40}
        note(stage, "task", "gsm8k", task_result(30, 40, 0.0), **whole)
        by_subject = {"law": {"correct": 4, "total": 16}, "art": {"correct": 6, "total": 24}}
        note(stage, "task", "mmlu", task_result(10, 40, 0.25, by_subject=by_subject), **whole)
        drawn = {**whole, "num_samples": 4, "temperature": 0.8}
        note(stage, "task", "gsm8k", task_result(20, 40, 0.0, majority=0.625), **drawn)
        bpb = {"bpb": 1.0625, "ci": [1.05, 1.075], "tokens": 5000}
        note(stage, "bpb", "val", bpb, corpus="books", split="val")
        for name in ("simplespelling", "spellingbee"):
            result = task_result(128, 256, 0.0)
            note(stage, "task", name, result, split="test", problems=256, of=256)
    core = {
        "core_partial": 0.125,
        "num_tasks": 1,
        "num_tasks_total": 2,
        "missing": ["squad"],
        "tasks": {"copa": task_result(60, 100, 0.5)},
    }
    note("base", "core", "CORE", core, max_per_task=None)
    note("base", "samples", "samples", {"samples": [{"prompt": "Once", "text": "upon | a time"}]})
    (base / "report" / "tok_eval.json").write_text(
        json.dumps(
            {
                "vocab_sizes": {"nanochat": 4096},
                "unavailable": ["gpt-4"],
                "round_trip": True,
                "rows": [{"text": "prose", "bytes": 99, "bytes_per_token": {"nanochat": 4.25}}],
            }
        )
    )
    written = script.main(script.Config(price_per_hour=3.0), single())
    assert written is not None
    markdown, page = (path.read_text() for path in written)
    sections = compose(collect(price_per_hour=3.0))

    assert row(sections, "training time") == ["30:00\N{NO-BREAK SPACE}min"] * 4
    assert row(sections, "with all around it") == ["40:00\N{NO-BREAK SPACE}min"] * 4
    assert row(sections, "cost") == ["2.00"] * 4
    assert row(sections, "FLOPs") == ["8.00e+12"] * 4
    assert row(sections, "peak memory") == ["3.00\N{NO-BREAK SPACE}GiB"] * 4
    assert row(sections, "state") == ["finished"] * 4
    assert row(sections, "device") == ["cpu"]
    assert row(sections, "parameters") == ["1,234"]
    assert row(sections, "validation bpb") == ["1.2000"] * 4 + [""]
    name = "bits per byte, books, val, 5,000 tokens"
    assert row(sections, name) == ["1.0625 (1.050–1.075)"] * 4 + [""]
    evaluation = [section for section in sections if section.title == "Evaluation"]
    assert row(evaluation, "gsm8k")[0].startswith("0.750 (0.60")
    assert row(sections, "mmlu")[4] == "0.250"
    assert row(evaluation, "gsm8k, 4 samples, temperature 0.8")[0].startswith("0.500 (")
    voted = "gsm8k, 4 samples, temperature 0.8, majority vote"
    assert row(evaluation, voted) == ["0.625"] * 4 + [""]
    of_generated = row(sections, "ChatCORE of generated tasks")
    assert of_generated == ["0.5000, partial (2 of 3)"] * 4 + [""]
    of_nanochat = row(sections, "ChatCORE of nanochat's tasks")
    assert of_nanochat == ["0.5000, partial (1 of 6)"] * 4 + [""], "its gsm8k has 40 problems"
    assert row(evaluation, "law") == ["0.250 of 16"] * 4
    assert row(sections, "CORE, partial (1 of 2 tasks)")[:2] == ["0.1250", "–"]
    assert row(sections, "copa")[0].startswith("0.600")
    assert row(sections, "prose") == ["99", "4.25"]
    shares = [t.rows for t in tables(sections) if t.head[0] == "trained on"]
    assert shares == [[["text", "30", "6,000", "75.0 %"], ["gsm8k", "10", "2,000", "25.0 %"]]] * 4
    total = next(b for b in sections[0].blocks if isinstance(b, Text)).text
    assert "3.20e+13 FLOPs" in total
    assert "8.00 at 3 an hour" in total
    assert collect().missing == []

    quotes = [b.text for s in sections for b in s.blocks if isinstance(b, Quote)]
    assert quotes == ["beginning", "upon | a time", *["beginning"] * 3]

    # Both formats carry every cell, text and sample.
    plain = re.sub(r"<[^>]*>", "", page)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Table):
                for cell in [c for r in [block.head, *block.rows] for c in r]:
                    assert html.escape(cell) in plain
                    assert " ".join(cell.split()) in markdown.replace("\\", "")
            elif isinstance(block, Quote):
                assert block.text in markdown
                assert html.escape(block.text) in page
    titles = [b.title for s in sections for b in s.blocks if isinstance(b, Plot)]
    assert titles[:6] == [
        "training loss",
        "validation, bits per byte",
        "other validation measures",
        "learning rate multiplier",
        "tokens a second",
        "memory, GiB",
    ]
    assert page.count("<svg ") == len(titles) == 24


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(base: Path) -> None:
    write_run(base, "base-x", whole_run("base"))
    page = Page(report.write_report()[1].read_text())
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
            assert value[1:] in ids
        for reference in re.findall(r"url\(([^)]*)\)", value):
            assert reference[1:] in ids
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    colors = [v for n, v in page.attributes if n == "style" and re.match("stroke|fill", v)]
    assert colors
    assert all(re.fullmatch(r"(stroke|fill):var\(--c\d\)", color) for color in colors)


def test_what_was_read_is_never_markup(base: Path) -> None:
    evil = "</pre><script>alert(1)</script> | `x` ```` & $\\no$ \"'"
    records = whole_run("base")
    records[0]["runtime"]["platform"] = evil
    records[0]["model"][evil] = evil
    records[-2] |= {"prompt": evil, "text": f"{evil}\n\x00\x08"}
    records[-1]["consumed"] = {evil: {"documents": 1, "tokens": 1}}
    records.insert(1, {"kind": "eval", "step": 0, "bpb": 3.0, evil: 1.0, "b": 2.0})
    records.insert(2, train(0, 5.0, **{evil: 1.0}))
    write_run(base, f"base-{'x'}", records)
    note("base", "task", evil, task_result(1, 2, 0.0))
    markdown, page = (path.read_text() for path in report.write_report())
    assert "script" not in Page(page).tags
    assert "<script" not in page
    assert "alert(1)" in page
    assert not {"\x00", "\x08"} & set(page + markdown)
    outside = re.sub(r"`````text\n.*?\n`````", "", markdown, flags=re.DOTALL)
    assert outside != markdown
    assert "<script" not in outside
    for lines in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        # No cell was split by a bar of the text's own.
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}
        assert len(bars) == 1


@pytest.mark.parametrize("present", [[], ["base"], ["sft"], ["mid", "rl"]])
def test_missing_stages_are_named(base: Path, present: list[str]) -> None:
    for stage in present:
        write_run(base, f"{stage}-x", whole_run(stage))
    markdown = report.write_report()[0].read_text()
    for stage in paths.STAGES:
        assert (f"## {stage.upper()}: " in markdown) == (stage in present)
        assert (f"a run of {stage} (runs/{stage}-" in markdown) == (stage not in present)
        assert (f"an evaluation of {stage} " in markdown) == (stage in present)
    assert "the tokenizer's evaluation" in markdown
    assert ("No stage has been run yet" in markdown) == (not present)


def test_an_evaluation_without_its_run_is_shown(base: Path) -> None:
    note("sft", "task", "gsm8k", task_result(1, 2, 0.0))
    sections = compose(collect())
    assert row(sections, "gsm8k")[0].startswith("0.500")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("pass@1_greedy", "share solved at the first try, the most likely token each time"),
        ("pass@1", "share solved at the first try, sampled"),
        ("pass@4", "share solved within 4 tries, sampled"),
        (
            "pass@1_greedy_arithmetic-level2",
            "arithmetic-level2: share solved at the first try, the most likely token each time",
        ),
        ("kl_to_start", "kl to start"),
    ],
)
def test_measures_have_names_in_words(key: str, words: str) -> None:
    assert report._measure(key) == words


def test_the_report_opens_with_what_the_model_answers(base: Path) -> None:
    exchanges = [
        {"kind": "sums", "messages": [["user", f"{n}+{n}"]], "answer": f"<{n}> `x`", "right": n > 1}
        for n in range(1, 11)
    ]
    kinds = {"sums": task_result(9, 10, 0.0)}
    result = {**task_result(9, 10, 0.0), "kinds": kinds, "exchanges": exchanges}
    note("sft", "task", "first_contact", result)
    markdown, page = (path.read_text() for path in report.write_report())
    first, second = re.findall("^## (.*)", markdown, re.MULTILINE)[:2]
    assert (first, second) == ("First contact", "Run")
    assert "model: <1> `x`" in markdown
    assert markdown.index("7+7") > markdown.index("| sums | 0.900") > markdown.index("6+6")
    assert "sums, not as it should be" in page
    assert "&lt;10&gt;" in page


def test_an_evaluation_of_an_older_step_says_so(base: Path) -> None:
    write_run(base, "sft-x", whole_run("sft"))
    note("sft", "task", "gsm8k", task_result(1, 2, 0.0), step=4)
    assert any("at its last step 8; the one shown is of step 4" in m for m in collect().missing)
    note("sft", "task", "gsm8k", task_result(2, 2, 0.0))
    note("sft", "task", "gsm8k", task_result(1, 2, 0.0), step=4)
    assert not any("last step" in m for m in collect().missing)
    evaluation = [section for section in compose(collect()) if section.title == "Evaluation"]
    assert row(evaluation, "gsm8k")[0].startswith("1.000")


def test_a_quick_look_is_hidden_by_the_whole_and_else_says_what_it_is(base: Path) -> None:
    note("base", "core", "CORE", {"core": 0.5}, max_per_task=None)
    note("base", "core", "CORE", {"core": 0.75}, max_per_task=5)
    note("base", "task", "gsm8k", task_result(1, 2, 0.0), split="test", problems=2, of=1319)
    note("base", "task", "gsm8k", task_result(3, 4, 0.0), split="train", problems=4, of=4)
    sections = compose(collect())
    assert row(sections, "CORE") == ["0.5000", ""]
    assert row(sections, "gsm8k, 2 of 1,319 problems")[0].startswith("0.500")
    assert row(sections, "gsm8k, split train")[0].startswith("0.750")
    names = [r[0] for table in tables(sections) for r in table.rows]
    assert not [name for name in names if "at most" in name or name == "gsm8k"]
    assert not [name for name in names if name.startswith("ChatCORE")]


def test_stages_that_answered_the_same_problems_are_compared(base: Path) -> None:
    problems = {
        "mid": [{"problem": i, "right": int(i < 10)} for i in range(40)],
        "sft": [{"problem": i, "right": int(9 <= i < 30)} for i in range(40)],
    }
    settings = {"split": "test", "problems": 40, "of": 40}
    for stage, lines in problems.items():
        right = sum(line["right"] for line in lines)
        meta = {"stage": stage, "tag": "x", "step": 8}
        record(meta, "task", "gsm8k", settings, task_result(right, 40, 0.0), lines)
    assert row(compose(collect()), "mid to sft") == ["gsm8k", "+20", "−9", "0.0614"]
    assert "McNemar" in report.write_report()[1].read_text()


def test_records_of_earlier_versions_are_shown(base: Path) -> None:
    """A file as they wrote it: one checkpoint's results by the task's name."""
    old = {
        "stage": "sft",
        "tag": "x",
        "step": 8,
        "weights": "abc",
        "asked": {"bpb": {"corpus": "books", "eval_tokens": 1000, "dtype": "torch.float32"}},
        "bpb": {"train": 1.5, "val": 1.25},
        "samples": [{"prompt": "Once", "text": "upon"}],
        "core_partial": 0.25,
        "core_tasks": {
            "core_partial": 0.25,
            "ci": [0.125, 0.375],
            "tasks": {"copa": task_result(60, 100, 0.5)},
            "num_tasks": 1,
            "num_tasks_total": 22,
            "missing": ["squad"],
            "max_per_task": None,
        },
        "core": 0.5,
        "results": {
            "gsm8k": {**task_result(1, 4, 0.0), "split": "test", "max_problems": 4, "seed": 1},
            "mmlu": task_result(3, 4, 0.25),
        },
        "chat_core": 0.3125,
    }
    path = evaluation_path("sft", "x")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(old))
    sections = compose(collect())
    assert row(sections, "bits per byte, books, val") == ["1.2500", ""]
    assert row(sections, "CORE, partial (1 of 22 tasks)") == ["0.2500 (0.125–0.375)", ""]
    assert row(sections, "gsm8k, 4 problems")[0].startswith("0.250")
    assert row(sections, "mmlu")[0].startswith("0.750")
    assert row(sections, "mean of 2 tasks, centred") == ["0.3125", ""]
    names = [r[0] for table in tables(sections) for r in table.rows]
    assert "CORE" not in names
    assert not [name for name in names if name.startswith("ChatCORE")]
    note("sft", "task", "mmlu", task_result(4, 4, 0.25), split="test", problems=4, of=4)
    assert row(compose(collect()), "mmlu")[0].startswith("1.000")
    assert row(compose(collect()), "gsm8k, 4 problems")[0].startswith("0.250")


def test_an_unfinished_run_with_odd_values_renders(base: Path) -> None:
    write_run(
        base,
        "base-x",
        [
            start(),
            train(1, math.nan),
            train(2, 4.0, memory_bytes=None, skipped=True),
            {"kind": "eval", "step": 2, "bpb": None},
            ["not a record"],
            '{"kind": "train", "step": 3, "lo',
        ],
    )
    (base / "report").mkdir()
    (base / "report" / "tok_eval.json").write_text("{")
    (base / "report" / "eval_base-x.json").write_text("[]")
    markdown = report.write_report()[0].read_text()
    sections = compose(collect())
    assert row(sections, "state") == ["stopped (8 steps planned)"]
    assert row(sections, "FLOPs") == ["2.00e+12"]
    assert "2 unreadable lines in base-x" in markdown
    assert "a readable tok\\_eval.json" in markdown or "a readable tok_eval.json" in markdown
    assert "a readable eval" in markdown
    assert "1 steps were skipped" in markdown


def test_a_run_of_only_a_start_renders(base: Path) -> None:
    write_run(base, "base-x", [start()])
    assert "No step has been recorded" in report.write_report()[0].read_text()
    write_run(base, "base-x", ["garbage"])
    assert "the start record in base-x" in report.write_report()[0].read_text()


def test_later_records_of_a_step_count_and_a_resumed_run_forgets_what_it_does_again(
    base: Path,
) -> None:
    path = write_run(
        base,
        "sft-a-b",
        [
            start("sft"),
            train(1, 9.0),
            train(2, 8.0),
            {"kind": "sample", "step": 2, "prompt": "p", "text": "old"},
            train(3, 7.0),
            {"kind": "eval", "step": 3, "bpb": 1.0},
            start("sft", step=2),
            {"kind": "sample", "step": 2, "prompt": "p", "text": "new"},
            train(3, 6.5),
        ],
    )
    run = read_run(path)
    assert (run.stage, run.tag, run.num_resumed) == ("sft", "a-b", 1)
    assert {step: record["loss"] for step, record in run.train.items()} == {1: 9, 2: 8, 3: 6.5}
    assert run.evals == {}
    assert [s["text"] for s in run.samples[2]] == ["new"]
    assert run.end is None
    assert row(compose(collect()), "resumed") == ["1 times"]


def test_the_tag_chooses_the_run(base: Path) -> None:
    import os

    for age, tag in ((100, "old"), (0, "new")):
        path = write_run(base, f"base-{tag}", [start(commit=tag), train(1, 2.0)])
        os.utime(path, (1e9 - age, 1e9 - age))
    assert collect().runs["base"].tag == "new"
    assert any("base-old" in item for item in collect().missing)
    assert collect("old").runs["base"].tag == "old"
    assert not any("base-new" in item for item in collect("old").missing)
    with pytest.raises(UserError, match=r"--tag none: .*base-new, base-old"):
        report.write_report("none")
    with pytest.raises(UserError, match="--price-per-hour -1"):
        report.write_report(price_per_hour=-1)


def test_every_tag_has_its_report_with_its_tokenizer(base: Path) -> None:
    for tag, name in (("default", ""), ("novels", "-novels")):
        first = {**start(), "tag": tag, "tokenizer_hash": tag}
        write_run(base, f"base-{tag}", [first, train(1, 2.0)])
        (base / "report").mkdir(exist_ok=True)
        path = base / "report" / f"tok_eval{name}.json"
        row = {"text": f"text of {tag}", "bytes": 9, "bytes_per_token": {"nanochat": 4.0}}
        path.write_text(json.dumps({"tokenizer_hash": tag, "rows": [row]}))
    first = report.write_report("default")
    assert first == (base / "report" / "report.md", base / "report" / "report.html")
    before = first[1].read_text()
    second = report.write_report("novels")
    assert second == tuple(base / "report" / "novels" / path.name for path in first)
    assert first[1].read_text() == before
    for path, wanted, other in ((first[0], "default", "novels"), (second[0], "novels", "default")):
        assert f"text of {wanted}" in path.read_text()
        assert f"text of {other}" not in path.read_text()


def test_machines_that_differ_are_told_apart(base: Path) -> None:
    write_run(base, "base-x", [start(device="H100", world_size=8), train(1, 2.0)])
    write_run(base, "mid-x", [start("mid", world_size=1), train(1, 2.0)])
    sections = compose(collect())
    assert row(sections, "device") == ["base: H100; mid: cpu"]
    assert row(sections, "processes") == ["base: 8; mid: 1"]
    assert row(sections, "activations") == ["bfloat16"]


def test_curves_are_smoothed_without_a_lag_and_thinned_without_a_loss() -> None:
    line = [2.0 * i for i in range(300)]
    shown = smoothed(line)
    assert shown[10:-10] == pytest.approx(line[10:-10])
    noisy = [float(i % 2) for i in range(300)]
    assert all(0.2 < value < 0.8 for value in smoothed(noisy))
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]
    steps, values = thinned(range(10_000), [5.0] * 5000 + [7.0] * 5000)
    assert len(steps) == len(values) <= 400
    assert values == [5.0] * 200 + [7.0] * 200
    assert sum(steps) / len(steps) == pytest.approx(4999.5)
    assert thinned([1, 2], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """Every curve's points on the panel."""
    curves = re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in curve.split())]
        for curve in curves
    ]


def test_curves_are_where_their_values_are_and_say_them() -> None:
    series = [("a<b", [1, 2, 5], [3.0, 1.0, 2.0]), ("b", [1, 5], [1.0, 3.0])]
    svg = plot_svg(Plot("loss & more", series))
    first, second = points_of(svg)
    assert first[0][0] == second[0][0] < first[1][0] < first[2][0] == second[1][0]
    assert first[1][0] - first[0][0] == pytest.approx((first[2][0] - first[0][0]) / 4, abs=0.1)
    assert first[0][1] == second[1][1] < first[2][1] < first[1][1] == second[0][1], "up is more"
    titles = set(re.findall("<title>([^<]*)</title>", svg))
    assert {"a&lt;b, step 2: 1", "a&lt;b, step 5: 2", "b, step 5: 3"} < titles
    assert 'aria-label="Curve of loss &amp; more over the steps"' in svg
    assert re.findall(r'class="y">([^<]*)<', svg) == ["1", "1.5", "2", "2.5", "3"]


def test_long_curves_are_drawn_smoothed_over_what_was_measured() -> None:
    noisy = [10.0 + i % 2 for i in range(5000)]
    svg = plot_svg(Plot("loss", [("", list(range(5000)), noisy)], smooth=True))
    measured, smooth = points_of(svg)
    assert len(measured) == len(smooth) == 400
    titles = re.findall("<title>step ([0-9,]+): ([0-9.]+)</title>", svg)
    assert 20 <= len(titles) <= 40
    assert {round(float(value), 1) for _, value in titles} == {10.5}
    assert ("4,993", "10.5") in titles, "the last"


@pytest.mark.parametrize(
    "values", [[0.0], [2.0, 2.0], [-1e308, 1e308], [1e-12, 3e-12], [-2.0, 0.0], [5e7, 5e7 + 1]]
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_finite_values_stay_within_their_panel(values: list[float], from_zero: bool) -> None:
    svg = plot_svg(Plot("x", [("", list(range(len(values))), values)], from_zero))
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    for x, y in points_of(svg)[0]:
        assert 0 < x < width
        assert 0 < y < height
    assert re.search('class="y">', svg)


def test_ticks_are_few_and_round() -> None:
    assert axis_ticks(0.0, 1.1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert axis_ticks(2.3, 3.5) == [2.4, 2.6, 2.8, 3.0, 3.2, 3.4]
    assert axis_ticks(-3.0, 21_400.0) == [0.0, 5000.0, 10_000.0, 15_000.0, 20_000.0]
    assert axis_ticks(0.9, 3.1, whole=True) == [1.0, 2.0, 3.0]


def test_numbers_for_people() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert [count_text(n) for n in (950, 9_999, 12_345, 1_234_567, 2.5e9, 1.2e15)] == [
        "950",
        "9,999",
        f"12.3{space}k",
        f"1.23{space}M",
        f"2.5{space}B",
        f"1,200{space}T",
    ]
    assert [duration_with_unit(s) for s in (5.25, 75, 3700, None)] == [
        f"5.2{space}s",
        f"1:15{space}min",
        f"1:01:40{space}h",
        "",
    ]


def test_bits_per_byte_of_a_mixture_are_one_plot(base: Path) -> None:
    measured = {"kind": "eval", "bpb": 1.5, "bpb_a": 1.0, "bpb_b": 2.0, "loss_user": 3.0}
    records = [start(), train(1, 5.0), {**measured, "step": 1}, end()]
    write_run(base, "base-x", records)
    plots = {b.title: b for s in compose(collect()) for b in s.blocks if isinstance(b, Plot)}
    names = [name for name, _, _ in plots["validation, bits per byte"].series]
    assert names == ["bpb", "bpb_a", "bpb_b"]
    by_role = plots["held-out loss by role, nats a token"].series
    assert [name for name, _, _ in by_role] == ["user"]
    assert "other validation measures" not in plots
    assert row(compose(collect()), "validation bpb, a") == ["1.0000", ""]
    assert row(compose(collect()), "loss, user") == ["3.0000"]


def test_every_curve_has_a_name_and_a_colour_of_its_own(base: Path) -> None:
    roles = ["masked", "special", "system", "user", "assistant", "tool_call", "tool_output"]
    losses = {f"loss_{name}": float(i) for i, name in enumerate(roles)}
    write_run(base, "sft-x", [start(), train(1, 5.0), {"kind": "eval", "step": 1, **losses}, end()])
    page = report.write_report()[1].read_text()
    figure = next(f for f in page.split("<figure>") if "loss by role" in f)
    keys = re.findall(r'background:var\((--c\d)\)"></i>(\w+)', figure)
    assert [name for _, name in keys] == roles
    assert len({color for color, _ in keys}) == len(roles)
    for color, _ in keys:
        assert f"{color}:" in page, "it is defined"
        assert f"stroke:var({color})" in figure, "it is drawn"
