"""The report card: what was trained on what machine, how it went, and what came out.

Reads `runs/<stage>-<tag>/metrics.jsonl` of every stage and the `report/*.json` of the evaluations;
writes `report/report.md` and a self-contained `report/report.html`. Whatever is missing is named,
and the rest is rendered. Everything that was read is data: it is escaped, never markup.
"""

import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

from nanochat import paths
from nanochat.errors import UserError

STAGES = {
    "base": "pretraining on text",
    "mid": "mid-training on conversations, tasks and text",
    "sft": "instruction tuning",
    "rl": "reinforcement learning",
}
Record: TypeAlias = dict[str, Any]


# Reading


@dataclass
class Run:
    """A stage's run, as its metrics.jsonl tells it."""

    stage: str
    tag: str
    path: Path
    start: Record = field(default_factory=dict)
    """The latest start record."""
    train: dict[int, Record] = field(default_factory=dict)
    evals: dict[int, Record] = field(default_factory=dict)
    samples: dict[int, list[Record]] = field(default_factory=dict)
    end: Record | None = None
    num_resumed: int = 0
    num_broken: int = 0
    """Lines that are no records: a kill may leave a torn one."""

    @property
    def last(self) -> Record:
        """The newest record that knows tokens and seconds."""
        if self.end is not None:
            return self.end
        return self.train[max(self.train)] if self.train else {}

    def planned(self, name: str) -> Any:
        return _mapping(self.start.get("plan")).get(name)


def read_run(path: Path) -> Run:
    """Read a metrics.jsonl. Of a step that was done twice the later record counts.

    A start record at step s says the run went on from there: what came after s is forgotten.
    """
    stage, _, tag = path.parent.name.partition("-")
    run = Run(stage, tag, path)
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                kind, step = record["kind"], int(record.get("step") or 0)
            except (ValueError, KeyError, TypeError, AttributeError):
                run.num_broken += 1
                continue
            if kind == "start":
                run.num_resumed += bool(run.start) and step > 0
                run.start, run.end = record, None
                for series in (run.train, run.evals, run.samples):
                    for later in [s for s in series if s > step]:
                        del series[later]
            elif kind == "train":
                run.train[step] = record
            elif kind == "eval":
                run.evals[step] = record
            elif kind == "sample":
                samples = run.samples.setdefault(step, [])
                samples[:] = [s for s in samples if s.get("prompt") != record.get("prompt")]
                samples.append(record)
            elif kind == "end":
                run.end = record
    return run


@dataclass
class Material:
    """All that a report is made of."""

    runs: dict[str, Run]
    """By stage, in the order of the stages."""
    evaluations: dict[str, Record]
    """By stage: report/eval_<stage>-<tag>.json."""
    tokenizer: Record | None
    missing: list[str]
    price_per_hour: float | None = None
    long_evaluations: list[Record] = field(default_factory=list)
    """report/long_eval_<stage>-<tag>.json, of all tags where none was chosen."""


def collect(tag: str | None = None, price_per_hour: float | None = None) -> Material:
    """Find the runs and evaluations under NANOCHAT_BASE_DIR.

    Of each stage the run named `tag`; without a tag, the one that was written last.
    """
    runs: dict[str, Run] = {}
    evaluations: dict[str, Record] = {}
    missing: list[str] = []
    root = paths.base_dir() / "runs"
    for stage in STAGES:
        found = sorted(root.glob(f"{stage}-*/metrics.jsonl"), key=lambda p: p.stat().st_mtime)
        if tag is not None:
            found = [path for path in found if path.parent.name == f"{stage}-{tag}"]
        if found:
            runs[stage] = read_run(found[-1])
            if runs[stage].num_broken:
                missing.append(
                    f"{runs[stage].num_broken} unreadable lines in {found[-1].parent.name}"
                )
            if not runs[stage].start:
                missing.append(f"the start record in {found[-1].parent.name}")
            if len(found) > 1:
                others = ", ".join(path.parent.name for path in found[:-1])
                missing.append(f"other runs of {stage} (not shown, choose with --tag): {others}")
        else:
            missing.append(f"a run of {stage} (runs/{stage}-{tag or '*'}/metrics.jsonl)")
        wanted = runs[stage].tag if stage in runs else tag or "*"
        results = sorted(
            paths.report_dir().glob(f"eval_{stage}-{wanted}.json"), key=lambda p: p.stat().st_mtime
        )
        evaluation = _read_json(results[-1], missing) if results else None
        if evaluation is not None:
            evaluations[stage] = evaluation
            last = runs[stage].last.get("step") if stage in runs else None
            if last is not None and evaluation.get("step") != last:
                missing.append(
                    f"an evaluation of {stage} at its last step {_whole(last)}; "
                    f"the one shown is of step {_whole(evaluation.get('step'))}"
                )
        elif stage in runs:
            script = "base_eval" if stage == "base" else "chat_eval"
            missing.append(f"an evaluation of {stage} (python -m scripts.{script})")
    found = sorted(paths.report_dir().glob(f"long_eval_*-{tag or '*'}.json"))
    read = (_read_json(path, missing) for path in found)
    long_evaluations = [record for record in read if record is not None]
    tokenizer = None
    if (paths.report_dir() / "tok_eval.json").is_file():
        tokenizer = _read_json(paths.report_dir() / "tok_eval.json", missing)
    else:
        missing.append("the tokenizer's evaluation (python -m scripts.tok_eval)")
    return Material(runs, evaluations, tokenizer, missing, price_per_hour, long_evaluations)


def _read_json(path: Path, missing: list[str]) -> Record | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        missing.append(f"a readable {path.name}")
        return None
    return value


def _mapping(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number, else None: files may hold NaN, null or anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


# What a report consists of; each renderer below knows these four


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    heat: bool = False
    """Whether cells are shares from 0 to 1, to be coloured."""


@dataclass(frozen=True)
class Quote:
    """Text from a model, shown as it is."""

    label: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One panel of curves; `series` are (name, steps, values)."""

    title: str
    series: list[tuple[str, list[int], list[float]]]
    from_zero: bool = False
    smooth: bool = False


Block: TypeAlias = Text | Table | Quote | Plot


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


def compose(material: Material) -> list[Section]:
    """The report's content, for either format."""
    sections = [_summary(material)]
    if material.evaluations or any(run.evals for run in material.runs.values()):
        sections.append(_evaluations(material))
    for stage, run in material.runs.items():
        sections.append(_stage(run, material.evaluations.get(stage, {})))
    if material.long_evaluations:
        sections.append(_long_context(material.long_evaluations))
    if material.tokenizer is not None:
        sections.append(_tokenizer(material.tokenizer))
    if material.missing:
        sections.append(
            Section(
                "What is missing",
                [Table(["not found or not shown"], [[item] for item in material.missing])],
            )
        )
    return sections


def _summary(material: Material) -> Section:
    runs = list(material.runs.values())
    if not runs:
        return Section("Run", [Text("No stage has been run yet.")])
    blocks: list[Block] = []
    seconds = math.fsum(_number(run.last.get("seconds")) or 0.0 for run in runs)
    tokens = sum(_number(run.last.get("tokens")) or 0 for run in runs)
    flops = math.fsum(_flops(run) or 0.0 for run in runs)
    total = f"{_count(tokens)} tokens, {_flops_text(flops)} FLOPs, {_duration(seconds)} of training"
    if material.price_per_hour is not None:
        cost = seconds / 3600 * material.price_per_hour
        total += f"; {cost:,.2f} at {material.price_per_hour:g} an hour (training steps only)"
    blocks.append(Text(total + "."))

    facts: dict[str, list[str]] = {}

    def add(name: str, values: Iterable[str]) -> None:
        texts = list(values)
        if any(texts):
            facts[name] = [text or "–" for text in texts]

    add("run", [run.tag for run in runs])
    add("state", [_state(run) for run in runs])
    add("started (UTC)", [_time(run.start.get("time")) for run in runs])
    add("steps", [_count(run.last.get("step")) for run in runs])
    add("tokens", [_count(run.last.get("tokens")) for run in runs])
    add("tokens a step", [_count(_tokens_a_step(run)) for run in runs])
    add("FLOPs", [_flops_text(_flops(run)) for run in runs])
    add("training time", [_duration(run.last.get("seconds")) for run in runs])
    if material.price_per_hour is not None:
        hours = [(_number(run.last.get("seconds")) or 0) / 3600 for run in runs]
        add("cost", [f"{hour * material.price_per_hour:,.2f}" for hour in hours])
    add("tokens a second", [_count(_speed(run)) for run in runs])
    add("peak memory", [_memory(_peak_memory(run)) for run in runs])
    add("resumed", [f"{run.num_resumed} times" if run.num_resumed else "" for run in runs])
    blocks.append(Table(["", *(run.stage for run in runs)], [[k, *v] for k, v in facts.items()]))

    machine = []
    known = ("device", "world_size", "threads", "dtype", "torch", "python", "platform", "commit")
    names = {"world_size": "processes", "dtype": "activations"}
    runtimes = {run.stage: _mapping(run.start.get("runtime")) for run in runs}
    others = sorted({key for runtime in runtimes.values() for key in runtime} - set(known))
    for key in (*known, *others):
        machine.append([names.get(key, key), _merged({s: r.get(key) for s, r in runtimes.items()})])
    blocks.append(Table(["machine", ""], [row for row in machine if row[1]]))

    model = _mapping(runs[-1].start.get("model"))
    parameters = _mapping(runs[-1].planned("parameters"))
    rows = [[key, _plain(value)] for key, value in model.items() if value not in (None, [], ())]
    sizes = {key: n for key, value in parameters.items() if (n := _number(value)) is not None}
    if sizes:
        rows.insert(0, ["parameters", f"{sum(sizes.values()):,.0f}"])
        rows += [[f"parameters: {key.replace('_', ' ')}", f"{n:,.0f}"] for key, n in sizes.items()]
    if rows:
        blocks.append(Table(["model", ""], rows))
    return Section("Run", blocks)


def _state(run: Run) -> str:
    if run.end is not None:
        return "finished"
    planned = _number(run.planned("num_steps"))
    return f"stopped, {planned:,.0f} steps planned" if planned else "not finished"


def _flops(run: Run) -> float | None:
    """Of the tokens that were trained on, by the plan's FLOPs per token."""
    planned, tokens = _number(run.planned("flops")), _number(run.planned("tokens"))
    done = _number(run.last.get("tokens"))
    return planned * done / tokens if planned and tokens and done else None


def _tokens_a_step(run: Run) -> float | None:
    """As planned; of reinforcement learning the mean, since its plan knows only a bound."""
    tokens, steps = _number(run.last.get("tokens")), _number(run.last.get("step"))
    if run.stage == "rl":
        return tokens / steps if tokens and steps else None
    return _number(run.planned("total_batch_size"))


def _speed(run: Run) -> float | None:
    tokens, seconds = _number(run.last.get("tokens")), _number(run.last.get("seconds"))
    return tokens / seconds if tokens and seconds else None


def _peak_memory(run: Run) -> float | None:
    """Over all processes of a resumed run, of which each counts from its own start."""
    values = [_number(record.get("memory_bytes")) or 0 for record in run.train.values()]
    values.append(_number(run.last.get("peak_memory_bytes")) or 0)
    return max(values) or None


def _merged(values: dict[str, Any]) -> str:
    """One value if all stages agree, else each stage's."""
    texts = {stage: _plain(value) for stage, value in values.items() if value is not None}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{stage}: {text}" for stage, text in texts.items())


def _evaluations(material: Material) -> Section:
    stages = [s for s in STAGES if s in material.runs or s in material.evaluations]
    rows: list[list[str]] = []

    def add(name: str, cells: dict[str, str], chance: str = "") -> None:
        if any(cells.values()):
            rows.append([name, *(cells.get(stage) or "–" for stage in stages), chance])

    last_evals = {s: run.evals[max(run.evals)] for s, run in material.runs.items() if run.evals}
    held_out: dict[str, dict[str, float]] = {}  # measure -> stage -> value
    for stage in stages:
        for key, value in last_evals.get(stage, {}).items():
            if key not in ("kind", "step") and (x := _number(value)) is not None:
                held_out.setdefault("validation bpb" if key == "bpb" else key, {})[stage] = x
        measured = material.evaluations.get(stage, {}).get("bpb")
        for split, value in (_mapping(measured) or {"val": measured}).items():
            if (x := _number(value)) is not None:
                name = "validation bpb" if split == "val" else f"{split} bpb"
                held_out.setdefault(name, {})[stage] = x
    for name, values in held_out.items():
        add(name, {stage: f"{value:.4f}" for stage, value in values.items()})
    cores = {stage: _core(material.evaluations.get(stage, {})) for stage in stages}
    for partial in (False, True):
        name = "CORE, partial" if partial else "CORE"
        add(name, {s: text for s, (text, is_partial, _) in cores.items() if is_partial == partial})
    tasks: dict[str, None] = {}
    for stage in stages:
        tasks |= dict.fromkeys(_mapping(material.evaluations.get(stage, {}).get("results")))
    for task in tasks:
        results = {
            stage: _mapping(_mapping(material.evaluations.get(stage, {}).get("results")).get(task))
            for stage in stages
        }
        chances = {
            f"{x:.3f}" for r in results.values() if (x := _number(r.get("chance"))) is not None
        }
        add(task, {s: _accuracy(r) for s, r in results.items()}, ", ".join(sorted(chances)))
    chat_core = {
        stage: f"{x:.4f}"
        for stage in stages
        if (x := _number(material.evaluations.get(stage, {}).get("chat_core"))) is not None
    }
    add("ChatCORE", chat_core)
    note = (
        "Accuracies with their 95 % intervals (Wilson). bpb: bits per byte, lower is better. "
        "ChatCORE: mean accuracy of the tasks, centred so that guessing is 0."
    )
    blocks: list[Block] = [Table(["", *(s.upper() for s in stages), "chance"], rows, note)]
    for stage in stages:
        core = cores[stage][2]
        rows = [
            [
                label,
                _accuracy(_mapping(result)),
                *(_fixed(_mapping(result).get(name), 3) for name in ("chance", "centered")),
            ]
            for label, result in _mapping(core.get("tasks")).items()
        ]
        if rows:
            missing = core.get("missing") or []
            note = f"Missing, not counted: {', '.join(map(str, missing))}." if missing else ""
            head = [f"CORE of {stage}", "accuracy", "chance", "centred"]
            blocks.append(Table(head, rows, note))
    return Section("Evaluation", blocks)


def _core(evaluation: Record) -> tuple[str, bool, Record]:
    """The score, whether it is partial, and evaluate_core's result if that is recorded."""
    result = _mapping(evaluation.get("core_tasks"))
    partial = "core" not in evaluation
    value = _number(evaluation.get("core_partial" if partial else "core"))
    if value is None:
        return "", partial, result
    if partial and result:
        done, total = (_whole(result.get(key)) for key in ("num_tasks", "num_tasks_total"))
        return f"{value:.4f} ({done} of {total} tasks)", partial, result
    return f"{value:.4f}", partial, result


def _accuracy(result: Record) -> str:
    accuracy = _number(result.get("accuracy"))
    if accuracy is None:
        return ""
    interval = result.get("ci")
    ends = [_number(x) for x in interval] if isinstance(interval, list) else []
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        return f"{accuracy:.3f} ({ends[0]:.2f}–{ends[1]:.2f})"
    return f"{accuracy:.3f}"


_PANELS = {
    # field of the train records: (title, factor, smooth, from zero)
    "loss": ("training loss", 1.0, True, False),
    "lr": ("learning rate multiplier", 1.0, False, True),
    "tokens_per_second": ("tokens a second", 1.0, False, True),
    "memory_bytes": ("memory, GiB", 2.0**-30, False, True),
    "mfu": ("share of the device's peak FLOPs", 1.0, False, True),
    "grad_norm": ("gradient norm", 1.0, True, True),
    # Of reinforcement learning.
    "reward": ("reward of rollouts", 1.0, True, False),
    "length": ("answer length in rollouts, tokens", 1.0, True, True),
    "truncated": ("share of rollouts cut off", 1.0, False, True),
    "entropy": ("entropy in rollouts, nats a token", 1.0, True, True),
    "kept_groups": ("share of groups with something to tell", 1.0, True, True),
    "rollout_tokens_per_second": ("rollouts, tokens a second", 1.0, False, True),
    "update_tokens_per_second": ("updates, tokens a second", 1.0, False, True),
}
_NO_PANEL = {"kind", "step", "tokens", "targets", "seconds", "time", "skipped", "rollout_seconds"}
_EVAL_PANELS = (
    # title, beginnings of the measures that have one scale
    ("held-out problems answered rightly", ("pass@",)),
    ("held-out reward", ("reward",)),
    ("held-out answer length, tokens", ("length",)),
    ("held-out entropy and KL to the start, nats a token", ("entropy", "kl_to_start")),
    ("held-out answers cut off, calls that work", ("truncated", "tool_success")),
    ("calls in a held-out answer", ("tool_calls",)),
    ("held-out pairs won", ("pair_wins",)),
    ("held-out preference loss", ("pair_loss",)),
    ("held-out preference margin", ("margin",)),
    ("held-out log-probability of answers", ("chosen_logprob", "rejected_logprob")),
)


def _stage(run: Run, evaluation: Record) -> Section:
    blocks: list[Block] = []
    names = dict.fromkeys(_PANELS)
    for record in run.train.values():
        names |= dict.fromkeys(k for k in record if k not in _NO_PANEL)
    plots: list[Plot] = []
    for name in names:
        title, factor, smooth, from_zero = _PANELS.get(
            name, (name.replace("_", " "), 1.0, False, False)
        )
        points = _points(run.train, name, factor)
        if points[0]:
            plots.append(Plot(title, [("", *points)], from_zero, smooth))
    measures = dict.fromkeys(k for record in run.evals.values() for k in record)
    held_out = [
        (name, *points)
        for name in measures
        if name not in ("kind", "step") and (points := _points(run.evals, name, 1.0))[0]
    ]
    bpb = [series for series in held_out if series[0].startswith("bpb")]  # of a mixture several
    others = [series for series in held_out if series not in bpb]
    if len(bpb) == 1:
        bpb = [("", *bpb[0][1:])]
    extra = [Plot("validation, bits per byte", bpb)] if bpb else []
    if run.stage == "rl":
        for title, beginnings in _EVAL_PANELS:
            series = [one for one in others if one[0].startswith(beginnings)]
            others = [one for one in others if one not in series]
            if len(series) == 1:
                series = [("", *series[0][1:])]
            extra += [Plot(title, series)] if series else []
    extra += [Plot("other validation measures", others)] if others else []
    plots[1:1] = extra
    blocks += plots
    skipped = sum(bool(record.get("skipped")) for record in run.train.values())
    if skipped:
        why = (
            "in every group of answers the rewards were equal, or gradients overflowed float16"
            if run.stage == "rl"
            else "their gradients overflowed float16"
        )
        blocks.append(Text(f"{skipped} steps were skipped: {why}."))
    if not plots:
        blocks.append(Text("No step has been recorded."))

    consumed = _mapping((run.end or {}).get("consumed"))
    amounts = {name: _mapping(value) for name, value in consumed.items()}
    total = sum(_number(value.get("tokens")) or 0 for value in amounts.values())
    rows = []
    for name, value in amounts.items():
        tokens = _number(value.get("tokens")) or 0
        share = f"{100 * tokens / total:.1f} %" if total else "–"
        rows.append([name, _whole(value.get("documents")), _whole(tokens), share])
    if rows:
        blocks.append(Table(["trained on", "documents", "tokens", "share"], rows))
    for step in sorted(run.samples)[-1:]:
        blocks += [_sample(f"sample at step {step:,}", sample) for sample in run.samples[step]]
    for sample in evaluation.get("samples") or []:
        label = f"sample of the evaluation at step {_whole(evaluation.get('step'))}"
        blocks.append(_sample(label, _mapping(sample)))
    kind = STAGES[run.stage]
    return Section(f"{run.stage.upper()}: {kind}", blocks)


def _sample(label: str, sample: Record) -> Quote:
    prompt, text = (
        # Control characters, which a young model likes to write, have no place in a page.
        re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(sample.get(key) or ""))
        for key in ("prompt", "text")
    )
    return Quote(f"{label}, after: {prompt}" if prompt else label, text)


def _points(records: dict[int, Record], name: str, factor: float) -> tuple[list[int], list[float]]:
    pairs = [
        (step, value * factor)
        for step in sorted(records)
        if (value := _number(records[step].get(name))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _long_context(records: list[Record]) -> Section:
    names = [f"{record.get('stage')}/{record.get('tag')}" for record in records]
    rows: dict[str, list[str]] = {}

    def add(name: str, column: int, value: Any, digits: int) -> None:
        cells = rows.setdefault(name, ["–"] * len(records))
        cells[column] = _fixed(value, digits)

    heat = []
    for column, (name, record) in enumerate(zip(names, records, strict=True)):
        add("context of the model", column, record.get("model_context_length"), 0)
        add("context it was first trained with", column, record.get("first_context_length"), 0)
        add("rotary base", column, record.get("rope_base"), 0)
        for length, value in _mapping(record.get("bpb")).items():
            add(f"bits per byte in rows of {length}", column, value, 4)
        gain = _mapping(record.get("context_gain"))
        if gain:
            last = _whole(gain.get("last_tokens"))
            add(f"context gain over the last {last} tokens", column, gain.get("gain"), 4)
        for bucket in map(_mapping, record.get("loss_by_position") or []):
            span = f"{_whole(bucket.get('from'))} to {_whole(bucket.get('to'))}"
            add(f"loss with {span} tokens of context", column, bucket.get("loss"), 3)
        grid = _mapping(record.get("passkey"))
        for how in ("forced", "generated"):
            head = [f"{name}, {how}: depth", *map(_whole, grid.get("lengths") or [])]
            cells = [
                [_fixed(depth, 2), *(_fixed(value, 2) for value in line)]
                for depth, line in zip(grid.get("depths") or [], grid.get(how) or [], strict=False)
            ]
            if cells:
                heat.append(Table(head, cells, heat=True))
    note = (
        "Losses in nats per token. The gain is the loss with the last tokens of the context minus "
        "the loss with all of it."
    )
    if heat:
        note += (
            " Below: shares of hidden words that were found, by where in the text they stood "
            "(0 the beginning, 1 the end) and how many tokens it had; forced: each token of the "
            "word is the likeliest after the true ones before it."
        )
    table = Table(["", *names], [[name, *cells] for name, cells in rows.items()], note)
    return Section("Long context", [table, *heat])


def _tokenizer(result: Record) -> Section:
    sizes = _mapping(result.get("vocab_sizes"))
    rows = []
    for row in result.get("rows") or []:
        ratios = _mapping(_mapping(row).get("bytes_per_token"))
        rows.append(
            [
                str(_mapping(row).get("text", "")),
                _whole(_mapping(row).get("bytes")),
                *(_fixed(ratios.get(name), 2) for name in sizes),
            ]
        )
    head = ["bytes per token", "bytes", *(f"{n} ({_whole(s)})" for n, s in sizes.items())]
    note = "More bytes per token mean fewer tokens for the same text."
    if result.get("unavailable"):
        note += f" Not at hand to compare with: {', '.join(map(str, result['unavailable']))}."
    if result.get("round_trip") is True:
        note += " Every text came back unchanged from encoding and decoding."
    return Section("Tokenizer", [Table(head, rows, note)])


# Numbers for people


def _count(value: Any) -> str:
    """12345678 -> 12.3 M"""
    number = _number(value)
    if number is None:
        return ""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            scale = 1e3 if unit == "k" else limit
            digits = f"{number / scale:.3g}" if number < 1000 * scale else f"{number / scale:,.0f}"
            return f"{digits}\N{NO-BREAK SPACE}{unit}"
    return f"{number:,.0f}"


def _whole(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


def _fixed(value: Any, digits: int) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.{digits}f}"


def _flops_text(value: float | None) -> str:
    return f"{value:.2e}" if value else ""


def _memory(value: float | None) -> str:
    return f"{value / 2**30:.2f}\N{NO-BREAK SPACE}GiB" if value else ""


def _duration(value: Any) -> str:
    seconds = _number(value)
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _time(value: Any) -> str:
    number = _number(value)
    if number is None:
        return ""
    try:
        return datetime.fromtimestamp(number, timezone.utc).strftime("%Y-%m-%d (%H:%M)")
    except (OverflowError, OSError, ValueError):
        return ""


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# Markdown


def to_markdown(sections: Sequence[Section]) -> str:
    """Tables and samples; of a plot its values along the run."""
    lines = ["# nanochat report", ""]
    for section in sections:
        lines += [f"## {_md(section.title)}", ""]
        plots = [block for block in section.blocks if isinstance(block, Plot)]
        for block in section.blocks:
            if isinstance(block, Plot):
                if block is plots[0]:
                    lines += [*_md_table(_plot_table(plots)), ""]
            elif isinstance(block, Table):
                lines += [*_md_table(block), ""]
                lines += [_md(block.note), ""] if block.note else []
            elif isinstance(block, Quote):
                longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
                fence = "`" * max(3, longest + 1)
                lines += [f"{_md(block.label)}:", "", f"{fence}text", block.text, fence, ""]
            else:
                lines += [_md(block.text), ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    """Ordinary text on one line, whatever it holds. Underscores inside words need no care."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(flat, quote=False))


def _md_table(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [[_md(cell) for cell in row] for row in (table.head, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _plot_table(plots: Sequence[Plot]) -> Table:
    """The curves at five places along the run; losses and the like smoothed."""
    head, rows = ["along the run", "0 %", "25 %", "50 %", "75 %", "100 %"], []
    for plot in plots:
        for name, _, values in plot.series:
            shown = smoothed(values) if plot.smooth else values
            places = [round(k / 4 * (len(shown) - 1)) for k in range(5)]
            label = f"{plot.title}: {name}" if name else plot.title
            rows.append([label, *(_tick(shown[place]) for place in places)])
    return Table(head, rows)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a fiftieth of the curve to either side: unlike a running average, without a lag.

    A handful of points is left as it is.
    """
    if len(values) < 10:
        return list(values)
    half = min(50, max(2, len(values) // 50))
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


# HTML

_MAX_POINTS = 400
_INK, _GRID = "#010203", "#040506"
_SERIES = ["#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"]
"""Stand-ins that become CSS variables, so that a plot follows the page's colour scheme."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff;
  --panel: #f6f8fa; --line: #d1d9e0; --c0: #0b62d6; --c1: #c2410c; --c2: #15803d; --c3: #9333ea;
  --c4: #be185d; --c5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --page: #0d1117;
  --panel: #161b22; --line: #30363d; --c0: #6cb2ff; --c1: #ff9d5c; --c2: #5dd28a; --c3: #c99bff;
  --c4: #ff8cc0; --c5: #5cd0e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { margin: .5rem 0 0; font-size: 1.7rem; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line);
  font-size: 1.25rem; }
p.note, figcaption, .label { color: var(--soft); font-size: .875rem; }
p.note { margin: .4rem 0 0; max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .5rem; font-size: .9rem; }
a { color: var(--c0); }
.scroll { overflow-x: auto; margin: 1rem 0 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:hover { background: var(--panel); }
table.pairs td, table.pairs th, table.list td { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--soft); white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: start; }
td b { font-weight: inherit; white-space: nowrap; }
.ci { color: var(--soft); font-size: .85em; white-space: nowrap; }
.bar { display: block; height: .3rem; margin-top: .15rem; background: var(--c0);
  border-radius: 2px; min-width: 1px; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; padding: .6rem .6rem .3rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; }
figcaption b { color: var(--ink); font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; color: var(--soft); }
.label { margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .6rem .8rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 560px) { body { font-size: 15px; } main { padding: .5rem .75rem 3rem; }
  table { font-size: .8rem; } .ci { display: block; font-size: .75em; } .beside { gap: 0; }
  th, td { padding: .25rem .3rem; white-space: normal; }
  td:first-child { min-width: 5rem; } }
"""


def to_html(sections: Sequence[Section]) -> str:
    """One page that needs nothing from elsewhere: style and plots are in it."""
    links, body = [], []
    for number, section in enumerate(sections):
        links.append(f'<a href="#s{number}">{html.escape(section.title.split(":")[0])}</a>')
        body.append(f'<h2 id="s{number}">{html.escape(section.title)}</h2>')
        plots = [block for block in section.blocks if isinstance(block, Plot)]
        previous: Block | None = None
        for block in section.blocks:
            if isinstance(block, Plot):
                if block is plots[0]:
                    figures = [_figure(plot, f"s{number}p{i}") for i, plot in enumerate(plots)]
                    body.append(f'<div class="plots">{"".join(figures)}</div>')
            elif isinstance(block, Table):
                table = _html_table(block)
                if _is_list(block) and previous is not None and _is_list(previous):
                    # Two narrow lists stand side by side where there is room.
                    table = f'<div class="beside">{body.pop()}{table}</div>'
                body.append(table)
            elif isinstance(block, Quote):
                label, text = html.escape(block.label), html.escape(block.text)
                body.append(f'<p class="label">{label}</p><pre>{text}</pre>')
            else:
                body.append(f"<p>{html.escape(block.text)}</p>")
            previous = block
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>nanochat report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>nanochat report</h1>\n<nav>{''.join(links)}</nav>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _is_list(block: Block) -> bool:
    return isinstance(block, Table) and len(block.head) <= 2


def _html_cell(cell: str) -> str:
    """An interval behind a number goes onto a line of its own where the page is narrow."""
    value, space, interval = cell.partition(" (")
    if not (space and interval.endswith(")") and value[:1].isdigit()):
        return html.escape(cell).replace("_", "_<wbr>")
    return f'<b>{html.escape(value)}</b> <span class="ci">({html.escape(interval)}</span>'


def _html_table(table: Table) -> str:
    kind = {1: "list", 2: "pairs"}.get(len(table.head), "")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        cells = [f"<td>{_html_cell(cell)}</td>" for cell in row]
        if table.heat:
            cells[1:] = [f'<td style="{_heat(cell)}">{html.escape(cell)}</td>' for cell in row[1:]]
        share = re.fullmatch(r"([0-9.]+) %", row[-1])
        if table.head[-1] == "share" and share:
            bar = f'<span class="bar" style="width:{min(100.0, float(share[1])):.1f}%"></span>'
            cells[-1] = f'<td style="min-width:6rem">{html.escape(row[-1])}{bar}</td>'
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _heat(cell: str) -> str:
    """A background, from none at 0 to the full colour at 1; pale enough for the text on it."""
    share = float(cell) if re.fullmatch(r"[01]\.[0-9]+", cell) else 0.0
    return f"background: color-mix(in srgb, var(--c2) {60 * share:.0f}%, transparent)"


def _figure(plot: Plot, name: str) -> str:
    ends = []
    for label, _, values in plot.series:
        last = _tick((smoothed(values) if plot.smooth else values)[-1])
        ends.append(f"{label} {last}" if label else last)
    caption = f"<b>{html.escape(plot.title)}</b>, at the end {html.escape(', '.join(ends))}"
    alt = html.escape(f"Curve of {plot.title} over the steps", quote=True)
    svg = plot_svg(plot, name).replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def plot_svg(plot: Plot, name: str) -> str:
    """The panel as an <svg> element in the page's colours; `name` keeps its ids apart."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, steps, values) in enumerate(plot.series):
            color = _SERIES[number % len(_SERIES)]
            width = 1.8
            marker = "o" if len(steps) < 12 else None
            if plot.smooth and len(values) >= 10:
                axes.plot(*thinned(steps, values), color=color, linewidth=0.8, alpha=0.35)
                values, marker = smoothed(values), None
            axes.plot(
                *thinned(steps, values),
                color=color,
                linewidth=width,
                marker=marker,
                markersize=3.5,
                label=label.replace("$", r"\$"),  # no formula
            )
        if plot.from_zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            highest = max(max(values) for _, _, values in plot.series)
            if highest > 0:
                axes.set_ylim(0, 1.08 * highest)
        ends = {step for _, steps, _ in plot.series for step in steps}
        if len(ends) == 1:
            axes.set_xlim(min(ends) - 1, min(ends) + 1)
        axes.grid(axis="y", linewidth=0.7)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _axis_number(y)))
        axes.set_xlabel("step")
        if any(label for label, _, _ in plot.series):
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    opening, closing, rest = svg.partition(">")
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)  # the page decides; viewBox stays
    svg = opening + closing + rest
    # Ids must be unique in the page, and most of matplotlib's are never referred to.
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\g<1>#{name}-", svg)
    for stand_in, color in (
        (_INK, "currentColor"),
        (_GRID, "var(--line)"),
        *((stand_in, f"var(--c{i})") for i, stand_in in enumerate(_SERIES)),
    ):
        svg = svg.replace(stand_in, color)
    return svg


def _axis_number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _MAX_POINTS points: means of equal shares of the curve."""
    if len(steps) <= _MAX_POINTS:
        return list(map(float, steps)), list(values)
    edges = [k * len(steps) // _MAX_POINTS for k in range(_MAX_POINTS + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return (
        [math.fsum(steps[p]) / len(steps[p]) for p in parts],
        [math.fsum(values[p]) / len(values[p]) for p in parts],
    )


# Writing


def write_report(tag: str | None = None, price_per_hour: float | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html; returns their paths."""
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {price_per_hour} must be at least 0")
    material = collect(tag, price_per_hour)
    if tag is not None and not material.runs and not material.evaluations:
        known = sorted(p.parent.name for p in (paths.base_dir() / "runs").glob("*/metrics.jsonl"))
        raise UserError(f"--tag {tag}: no run of that name; there are {', '.join(known) or 'none'}")
    sections = compose(material)
    markdown, page = paths.report_dir() / "report.md", paths.report_dir() / "report.html"
    paths.atomic_write(markdown, to_markdown(sections))
    paths.atomic_write(page, to_html(sections))
    return markdown, page
