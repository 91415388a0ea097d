"""Sections of the report card: machine and data, course of training, results.

`material` reads `runs/<stage>-<tag>/metrics.jsonl` of every stage and the evaluations'
`report/*.json`. This module composes sections of `blocks` from them, and `pages` writes these as
`report/report.md` and `report/report.html`. The report lists what is missing.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.errors import UserError
from nanochat.eval.record import Measurement, chat_core_texts, compare, find, labels
from nanochat.report.blocks import (
    Block,
    Plot,
    Quote,
    Record,
    Section,
    Table,
    Text,
    as_mapping,
    as_number,
    count_text,
    duration_with_unit,
    fixed_text,
    flops_text,
    memory_text,
    plain_text,
    time_text,
    whole_text,
)
from nanochat.report.material import STAGE_TITLES, Material, StageRun, collect
from nanochat.report.pages import to_html, to_markdown


def write_report(tag: str | None = None, price_per_hour: float | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html; returns their paths."""
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {price_per_hour} must be at least 0")
    material = collect(tag, price_per_hour)
    if tag is not None and not material.runs and not material.evaluations:
        known = sorted(p.parent.name for p in (paths.base_dir() / "runs").glob("*/metrics.jsonl"))
        raise UserError(f"--tag {tag}: no run of that name; there are {', '.join(known) or 'none'}")
    sections = compose(material)
    folder = paths.report_dir(tag or "default")
    markdown, page = folder / "report.md", folder / "report.html"
    paths.atomic_write(markdown, to_markdown(sections))
    paths.atomic_write(page, to_html(sections))
    return markdown, page


def compose(material: Material) -> list[Section]:
    """Compose the report's content for both formats."""
    sections = [*_first_contact(material), _summary(material)]
    if material.evaluations or any(run.evals for run in material.runs.values()):
        sections.append(_evaluations(material))
    for stage, run in material.runs.items():
        sections.append(stage_section(run, material.evaluations.get(stage, [])))
    if material.long_evaluations:
        sections.append(long_context_section(material.long_evaluations))
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


def _first_contact(material: Material) -> list[Section]:
    """Section on the last evaluated stage's answers to first messages, with shares by kind."""
    for stage in reversed(paths.STAGES):
        measured = material.evaluations.get(stage, [])
        found = [one["result"] for one in measured if one["name"] == "first_contact"]
        if found:
            result = found[-1]
            break
    else:
        return []
    blocks: list[Block] = [
        Text(
            f"What the model after {stage.upper()} answers to messages that it was never trained "
            "on, the most likely token each time."
        )
    ]
    for exchange in map(as_mapping, result.get("exchanges") or []):
        lines = [f"{role}: {text}" for role, text in exchange.get("messages") or []]
        lines.append(f"model: {exchange.get('answer')}")
        verdict = "as it should be" if exchange.get("right") else "not as it should be"
        blocks.append(_sample(f"{exchange.get('kind')}, {verdict}", {"text": "\n".join(lines)}))
    kinds = {"all": result, **as_mapping(result.get("kinds"))}
    rows = [
        [kind, _accuracy(as_mapping(one)), whole_text(as_mapping(one).get("total"))]
        for kind, one in kinds.items()
    ]
    note = (
        "Shares of messages that are answered as a person would accept, with their 95 % intervals."
    )
    blocks.insert(7, Table(["first contact", "share", "messages"], rows, note))
    return [Section("First contact", blocks)]


def _summary(material: Material) -> Section:
    runs = list(material.runs.values())
    if not runs:
        return Section("Run", [Text("No stage has been run yet.")])
    blocks: list[Block] = []
    seconds = [_elapsed(run) for run in runs]
    tokens = sum(as_number(run.last.get("tokens")) or 0 for run in runs)
    flops = math.fsum(_flops(run) or 0.0 for run in runs)
    total = f"{count_text(tokens)} tokens, {flops_text(flops)} FLOPs"
    total += f", {duration_with_unit(math.fsum(seconds))} of training runs"
    if material.price_per_hour is not None:
        cost = math.fsum(seconds) / 3600 * material.price_per_hour
        total += f"; {cost:,.2f} at {material.price_per_hour:g} an hour (without the evaluations)"
    blocks.append(Text(total + "."))

    facts: dict[str, list[str]] = {}

    def add(name: str, values: Iterable[str]) -> None:
        texts = list(values)
        if any(texts):
            facts[name] = [text or "–" for text in texts]

    add("run", [run.tag for run in runs])
    add("state", [_state(run) for run in runs])
    add("started (UTC)", [time_text(run.start.get("time")) for run in runs])
    add("steps", [count_text(run.last.get("step")) for run in runs])
    add("tokens", [count_text(run.last.get("tokens")) for run in runs])
    add("tokens a step", [count_text(_tokens_a_step(run)) for run in runs])
    add("FLOPs", [flops_text(_flops(run)) for run in runs])
    add("training time", [duration_with_unit(run.last.get("seconds")) for run in runs])
    add("with all around it", [duration_with_unit(run.last.get("elapsed_seconds")) for run in runs])
    if material.price_per_hour is not None:
        add("cost", [f"{one / 3600 * material.price_per_hour:,.2f}" for one in seconds])
    add("tokens a second", [count_text(_speed(run)) for run in runs])
    add("peak memory", [memory_text(_peak_memory(run)) for run in runs])
    add("resumed", [f"{run.num_resumed} times" if run.num_resumed else "" for run in runs])
    blocks.append(Table(["", *(run.stage for run in runs)], [[k, *v] for k, v in facts.items()]))

    machine = []
    known = ("device", "world_size", "threads", "dtype", "torch", "python", "platform", "commit")
    names = {"world_size": "processes", "dtype": "activations"}
    runtimes = {run.stage: as_mapping(run.start.get("runtime")) for run in runs}
    others = sorted({key for runtime in runtimes.values() for key in runtime} - set(known))
    for key in (*known, *others):
        machine.append([names.get(key, key), _merged({s: r.get(key) for s, r in runtimes.items()})])
    blocks.append(Table(["machine", ""], [row for row in machine if row[1]]))

    model = as_mapping(runs[-1].start.get("model"))
    parameters = as_mapping(runs[-1].planned("parameters"))
    rows = [[key, plain_text(value)] for key, value in model.items() if value not in (None, [], ())]
    sizes = {key: n for key, value in parameters.items() if (n := as_number(value)) is not None}
    if sizes:
        rows.insert(0, ["parameters", f"{sum(sizes.values()):,.0f}"])
        rows += [[f"parameters: {key.replace('_', ' ')}", f"{n:,.0f}"] for key, n in sizes.items()]
    if rows:
        blocks.append(Table(["model", ""], rows))
    return Section("Run", blocks)


def _state(run: StageRun) -> str:
    if run.end is not None:
        return "finished"
    planned = as_number(run.planned("num_steps"))
    return f"stopped ({planned:,.0f} steps planned)" if planned else "not finished"


def _flops(run: StageRun) -> float | None:
    """FLOPs of the run: tokens trained on times the plan's FLOPs per token."""
    planned, tokens = as_number(run.planned("flops")), as_number(run.planned("tokens"))
    done = as_number(run.last.get("tokens"))
    return planned * done / tokens if planned and tokens and done else None


def _elapsed(run: StageRun) -> float:
    """Seconds of machine time; reading, evaluating and saving are included if recorded."""
    return as_number(run.last.get("elapsed_seconds")) or as_number(run.last.get("seconds")) or 0.0


def _tokens_a_step(run: StageRun) -> float | None:
    """Planned tokens per step; for reinforcement learning the mean, as its plan is a bound."""
    tokens, steps = as_number(run.last.get("tokens")), as_number(run.last.get("step"))
    if run.stage == "rl":
        return tokens / steps if tokens and steps else None
    return as_number(run.planned("total_batch_size"))


def _speed(run: StageRun) -> float | None:
    tokens, seconds = as_number(run.last.get("tokens")), as_number(run.last.get("seconds"))
    return tokens / seconds if tokens and seconds else None


def _peak_memory(run: StageRun) -> float | None:
    """Peak memory over all processes of a resumed run, each of which counts from its start."""
    values = [as_number(record.get("memory_bytes")) or 0 for record in run.train.values()]
    values.append(as_number(run.last.get("peak_memory_bytes")) or 0)
    return max(values) or None


def _merged(values: dict[str, Any]) -> str:
    """Format one value if all stages agree, else the value of each stage."""
    texts = {stage: plain_text(value) for stage, value in values.items() if value is not None}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{stage}: {text}" for stage, text in texts.items())


def _evaluations(material: Material) -> Section:
    stages = [s for s in paths.STAGES if s in material.runs or s in material.evaluations]
    rows: list[list[str]] = []

    def add(name: str, cells: dict[str, str], chance: str = "") -> None:
        if any(cells.values()):
            rows.append([name, *(cells.get(stage) or "–" for stage in stages), chance])

    last_evals = {s: run.evals[max(run.evals)] for s, run in material.runs.items() if run.evals}
    held_out: dict[str, dict[str, float]] = {}  # measure -> stage -> value
    for stage in stages:
        for key, value in last_evals.get(stage, {}).items():
            if key not in ("kind", "step") and (x := as_number(value)) is not None:
                held_out.setdefault(_measure(key), {})[stage] = x
    measures = [
        [name, *(f"{values[s]:.4f}" if s in values else "–" for s in stages)]
        for name, values in held_out.items()
        if "bpb" not in name
    ]
    for name, values in held_out.items():
        if "bpb" in name:
            add(name, {stage: f"{value:.4f}" for stage, value in values.items()})
    measured = [
        (stage, one)
        for stage in stages
        for one in material.evaluations.get(stage, [])
        if one["kind"] in _TABLED
    ]
    # A row has one label, and so equal settings, in all stages.
    by_label: dict[tuple[str, str], dict[str, Record]] = {}
    told = labels([one for _, one in measured])
    for (stage, one), label in zip(measured, told, strict=True):
        by_label.setdefault((one["kind"], label), {})[stage] = one["result"]
    for kind in _TABLED:
        if kind == "task":
            texts = {s: chat_core_texts(material.evaluations.get(s, [])) for s in stages}
            for name in dict.fromkeys(name for known in texts.values() for name in known):
                add(name, {stage: known.get(name, "") for stage, known in texts.items()})
        for (found, label), results in by_label.items():
            if found == kind:
                chances = {
                    f"{x:.3f}"
                    for result in results.values()
                    if (x := as_number(result.get("chance"))) is not None
                }
                cells = {stage: _cell(kind, result) for stage, result in results.items()}
                add(label, cells, ", ".join(sorted(chances)))
                votes = {
                    stage: f"{x:.3f}"
                    for stage, result in results.items()
                    if (x := as_number(result.get("majority"))) is not None
                }
                add(f"{label}, majority vote", votes)
    note = (
        "Shares solved and bits per byte with their 95 % intervals. bpb: bits per byte, lower is "
        "better. ChatCORE: mean accuracy of a set of tasks on their whole test splits, centred so "
        "that guessing is 0. CORE: as nanochat's base_eval computes it."
    )
    head = ["", *(s.upper() for s in stages)]
    blocks: list[Block] = [Table([*head, "chance"], rows, note)] if rows else []
    if measures:
        note = "At a run's last evaluation. Losses: of held-out conversations, in nats a token."
        blocks.append(Table(["held out", *head[1:]], measures, note))
    for (kind, label), results in by_label.items():
        if kind == "core":
            blocks += [_core_tasks(f"{label} of {s}", result) for s, result in results.items()]
        if kind == "task":
            blocks += _by_subject(label, results)
    blocks += _paired(material, stages)
    return Section("Evaluation", blocks)


def _measure(key: str) -> str:
    """Name of a field of the eval records: `loss_tool_call` -> "loss, tool call"."""
    if key.startswith("bpb"):
        return f"validation bpb{key[3:].replace('_', ', ', 1)}"
    if key == "loss_masked":
        return "loss, masked: what instruction tuning minimises"
    if key.startswith("loss_"):
        return f"loss, {key[5:].replace('_', ' ')}"
    found = re.fullmatch(r"pass@(\d+)(_greedy)?(?:_(.+))?", key)
    if found:
        k, greedy, task = found.groups()
        tries = "at the first try" if k == "1" else f"within {k} tries"
        how = ", the most likely token each time" if greedy else ", sampled"
        return f"{task + ': ' if task else ''}share solved {tries}{how}"
    return key.replace("_", " ")


_TABLED = ("bpb", "text", "core", "task", "chat_core")
"""Kinds of measurements in the main table, in its order."""


def _cell(kind: str, result: Record) -> str:
    if kind == "task":
        return _accuracy(result)
    if kind == "text":
        return _with_interval(result, "bpb", 4) + (
            f", {x:,.1f} a word" if (x := as_number(result.get("word_perplexity"))) else ""
        )
    key = kind if kind != "core" or "core" in result else "core_partial"
    return _with_interval(result, key, 4)


def _core_tasks(title: str, core: Record) -> Table:
    rows = [
        [
            label,
            _accuracy(as_mapping(result)),
            *(fixed_text(as_mapping(result).get(name), 3) for name in ("chance", "centered")),
        ]
        for label, result in as_mapping(core.get("tasks")).items()
    ]
    missing = core.get("missing") or []
    note = f"Missing, not counted: {', '.join(map(str, missing))}." if missing else ""
    return Table([title, "accuracy", "chance", "centred"], rows, note)


def _by_subject(label: str, results: dict[str, Record]) -> list[Block]:
    """Make a table of a task's subjects, if it has any."""
    subjects = {stage: as_mapping(result.get("by_subject")) for stage, result in results.items()}
    names = sorted({str(name) for known in subjects.values() for name in known})
    rows = []
    for name in names:
        cells = []
        for known in subjects.values():
            correct, total = (
                as_number(as_mapping(known.get(name)).get(key)) for key in ("correct", "total")
            )
            cells.append(f"{(correct or 0) / total:.3f} of {total:,.0f}" if total else "–")
        rows.append([name, *cells])
    return [Table([label, *(stage.upper() for stage in results)], rows)] if rows else []


def _paired(material: Material, stages: Sequence[str]) -> list[Block]:
    """Compare each two stages that answered the same problems, by McNemar's test."""
    rows = []
    tasks = {
        stage: [one for one in material.evaluations.get(stage, []) if one["kind"] == "task"]
        for stage in stages
    }
    for before, after in itertools.pairwise(stages):
        for one in tasks[after]:
            other = find(tasks[before], "task", one["name"], one["settings"])
            test = compare(other, one) if other else None
            if test is not None:
                change = [f"+{test['gained']:,}", f"−{test['lost']:,}", f"{test['p']:.3g}"]
                rows.append([f"{before} to {after}", labels([one])[0], *change])
    note = (
        "Problems that only the later, only the earlier stage answers rightly, and McNemar's exact "
        "two-sided p: how likely so uneven a split would be if both were as good."
    )
    head = ["between stages", "task", "gained", "lost", "p"]
    return [Table(head, rows, note)] if rows else []


def _with_interval(result: Record, key: str, digits: int) -> str:
    value = as_number(result.get(key))
    if value is None:
        return ""
    interval = result.get("ci")
    ends = [as_number(x) for x in interval] if isinstance(interval, list) else []
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        few = max(2, digits - 1)
        return f"{value:.{digits}f} ({ends[0]:.{few}f}–{ends[1]:.{few}f})"
    return f"{value:.{digits}f}"


def _accuracy(result: Record) -> str:
    return _with_interval(result, "accuracy", 3)


def _tokenizer(result: Record) -> Section:
    sizes = as_mapping(result.get("vocab_sizes"))
    rows = []
    for row in result.get("rows") or []:
        ratios = as_mapping(as_mapping(row).get("bytes_per_token"))
        rows.append(
            [
                str(as_mapping(row).get("text", "")),
                whole_text(as_mapping(row).get("bytes")),
                *(fixed_text(ratios.get(name), 2) for name in sizes),
            ]
        )
    head = ["bytes per token", "bytes", *(f"{n} ({whole_text(s)})" for n, s in sizes.items())]
    note = "More bytes per token mean fewer tokens for the same text."
    if result.get("unavailable"):
        note += f" Not at hand to compare with: {', '.join(map(str, result['unavailable']))}."
    if result.get("round_trip") is True:
        note += " Every text came back unchanged from encoding and decoding."
    return Section("Tokenizer", [Table(head, rows, note)])


_PANELS = {
    # field of the train records: (title, factor, smooth, from zero)
    "loss": ("training loss", 1.0, True, False),
    "lr": ("learning rate multiplier", 1.0, False, True),
    "tokens_per_second": ("tokens a second", 1.0, False, True),
    "memory_bytes": ("memory, GiB", 2.0**-30, False, True),
    "mfu": ("share of the device's peak FLOPs", 1.0, False, True),
    # Fields of reinforcement learning.
    "reward": ("reward of rollouts", 1.0, True, False),
    "length": ("answer length in rollouts, tokens", 1.0, True, True),
    "truncated": ("share of rollouts cut off", 1.0, False, True),
    "entropy": ("entropy in rollouts, nats a token", 1.0, True, True),
    "kept_groups": ("share of groups with something to tell", 1.0, True, True),
    "tool_calls": ("calls in an answer of rollouts", 1.0, True, True),
    "tool_success": ("share of calls in rollouts that work", 1.0, False, False),
    "bonus": ("format bonus in rollouts", 1.0, True, True),
    "clipped": ("share of importance weights clipped", 1.0, True, True),
    "rollout_tokens_per_second": ("rollouts, tokens a second", 1.0, False, True),
    "update_tokens_per_second": ("updates, tokens a second", 1.0, False, True),
}
_NO_PANEL = {"kind", "step", "time", "tokens", "targets", "skipped"}
_NO_PANEL |= {"seconds", "elapsed_seconds", "rollout_seconds"}


_EVAL_PANELS = (
    # title, prefixes of the measures with one scale
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


def stage_section(run: StageRun, measured: list[Measurement]) -> Section:
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
    bpb = [series for series in held_out if series[0].startswith("bpb")]  # several for a mixture
    others = [series for series in held_out if series not in bpb]
    if len(bpb) == 1:
        bpb = [("", *bpb[0][1:])]
    extra = [Plot("validation, bits per byte", bpb)] if bpb else []
    if run.stage == "rl":
        for title, beginnings in _EVAL_PANELS:
            chosen = [one for one in others if one[0].startswith(beginnings)]
            others = [one for one in others if one not in chosen]
            series = [(_measure(name), steps, values) for name, steps, values in chosen]
            if len(series) == 1:
                series = [("", *series[0][1:])]
            extra += [Plot(title, series)] if series else []
    by_role = [(name[len("loss_") :], x, y) for name, x, y in others if name.startswith("loss_")]
    others = [one for one in others if not one[0].startswith("loss_")]
    extra += [Plot("held-out loss by role, nats a token", by_role)] if by_role else []
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

    consumed = as_mapping((run.end or {}).get("consumed"))
    amounts = {name: as_mapping(value) for name, value in consumed.items()}
    total = sum(as_number(value.get("tokens")) or 0 for value in amounts.values())
    rows = []
    for name, value in amounts.items():
        tokens = as_number(value.get("tokens")) or 0
        share = f"{100 * tokens / total:.1f} %" if total else "–"
        rows.append([name, whole_text(value.get("documents")), whole_text(tokens), share])
    if rows:
        blocks.append(Table(["trained on", "documents", "tokens", "share"], rows))
    for step in sorted(run.samples)[-1:]:
        blocks += [_sample(f"sample at step {step:,}", sample) for sample in run.samples[step]]
    for one in measured:
        if one["kind"] == "samples":
            label = f"sample of the evaluation at step {whole_text(one['step'])}"
            samples = one["result"].get("samples") or []
            blocks += [_sample(label, as_mapping(sample)) for sample in samples]
    kind = STAGE_TITLES[run.stage]
    return Section(f"{run.stage.upper()}: {kind}", blocks)


def _sample(label: str, sample: Record) -> Quote:
    prompt, text = (
        # A model at an early step may write control characters, which a page must not contain.
        re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(sample.get(key) or ""))
        for key in ("prompt", "text")
    )
    return Quote(f"{label}, after: {prompt}" if prompt else label, text)


def _points(records: dict[int, Record], name: str, factor: float) -> tuple[list[int], list[float]]:
    pairs = [
        (step, value * factor)
        for step in sorted(records)
        if (value := as_number(records[step].get(name))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def long_context_section(records: list[Record]) -> Section:
    """Section that compares models by context: its length, its gain, and hidden words found."""
    names = [f"{record.get('stage')}/{record.get('tag')}" for record in records]
    rows: dict[str, list[str]] = {}

    def add(name: str, column: int, cell: str) -> None:
        rows.setdefault(name, ["–"] * len(records))[column] = cell

    grids: dict[str, list[Block]] = {"forced": [], "generated": []}
    for column, (name, record) in enumerate(zip(names, records, strict=True)):
        if "corpus" in record:
            add("corpus", column, f"{record['corpus']}, {record.get('split')}")
            add("tokens of a loss, at most", column, whole_text(record.get("eval_tokens")))
        add("context of the model", column, whole_text(record.get("model_context_length")))
        add("context at first", column, whole_text(record.get("first_context_length")))
        add("rotary base", column, whole_text(record.get("rope_base")))
        for length, value in as_mapping(record.get("bpb")).items():
            add(f"bits per byte in rows of {length}", column, fixed_text(value, 4))
        gain = as_mapping(record.get("context_gain"))
        if gain:
            last = whole_text(gain.get("last_tokens"))
            add(f"context gain over {last} tokens", column, fixed_text(gain.get("gain"), 4))
        for bucket in map(as_mapping, record.get("loss_by_position") or []):
            span = [whole_text(bucket.get(end)) for end in ("from", "to")]
            add(f"loss at {' to '.join(dict.fromkeys(span))}", column,
                fixed_text(bucket.get("loss"), 3))  # fmt: skip
        grid = as_mapping(record.get("passkey"))
        head = [name, *map(whole_text, grid.get("lengths") or [])]
        for how, tables in grids.items():
            cells = [
                [f"depth {fixed_text(depth, 2)}", *(fixed_text(value, 2) for value in line)]
                for depth, line in zip(grid.get("depths") or [], grid.get(how) or [], strict=False)
            ]
            if cells:
                tables.append(Table(head, cells, heat=True))
    note = (
        "Losses in nats per token, by how many tokens of context a target has. The gain is the "
        "loss with the last tokens of the context minus the loss with all of it."
    )
    blocks: list[Block] = [
        Table(["", *names], [[name, *cells] for name, cells in rows.items()], note)
    ]
    explained = {
        "forced": "Shares of hidden passwords that are found, by where in the text they stand (0 "
        "the beginning, 1 the end) and how many tokens it has. Forced: each token of the password "
        "is the likeliest after the true ones before it.",
        "generated": "Generated: the model's own greedy answer ends with the password.",
    }
    for how, tables in grids.items():
        if tables:
            blocks += [Text(explained[how]), *tables]
    return Section("Long context", blocks)
