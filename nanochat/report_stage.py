"""The report's sections about one stage's run and about long contexts."""

import re

from nanochat.report_blocks import (
    Block,
    Plot,
    Quote,
    Record,
    Section,
    Table,
    Text,
    as_mapping,
    as_number,
    fixed_text,
    whole_text,
)
from nanochat.report_material import STAGES, Run

_PANELS = {
    # field of the train records: (title, factor, smooth, from zero)
    "loss": ("training loss", 1.0, True, False),
    "lr": ("learning rate multiplier", 1.0, False, True),
    "tokens_per_second": ("tokens a second", 1.0, False, True),
    "memory_bytes": ("memory, GiB", 2.0**-30, False, True),
    "mfu": ("share of the device's peak FLOPs", 1.0, False, True),
    # Of reinforcement learning.
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
_NO_PANEL = {"kind", "step", "tokens", "targets", "seconds", "elapsed_seconds", "time", "skipped"}
_NO_PANEL |= {"rollout_seconds"}
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


def stage_section(run: Run, evaluation: Record) -> Section:
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
    for sample in evaluation.get("samples") or []:
        label = f"sample of the evaluation at step {whole_text(evaluation.get('step'))}"
        blocks.append(_sample(label, as_mapping(sample)))
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
        if (value := as_number(records[step].get(name))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def long_context_section(records: list[Record]) -> Section:
    """Models beside each other: what their context is and costs, and what they find in it."""
    names = [f"{record.get('stage')}/{record.get('tag')}" for record in records]
    rows: dict[str, list[str]] = {}

    def add(name: str, column: int, cell: str) -> None:
        rows.setdefault(name, ["–"] * len(records))[column] = cell

    grids: dict[str, list[Block]] = {"forced": [], "generated": []}
    for column, (name, record) in enumerate(zip(names, records, strict=True)):
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
