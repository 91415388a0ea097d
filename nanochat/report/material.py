"""Material of a report: metrics of runs and results of evaluations, read from their files.

Missing and broken files are listed in the report. Values that were read may have any type.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.eval.record import Measurement, read_measurements, to_show
from nanochat.report.blocks import Record, as_mapping, whole_text

STAGE_TITLES = {
    "base": "pretraining on text",
    "mid": "mid-training on conversations, tasks and text",
    "sft": "instruction tuning",
    "rl": "reinforcement learning",
}


@dataclass
class StageRun:
    """Records of a stage's run, from its metrics.jsonl."""

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
    """Number of lines that are not records; a kill may leave an incomplete line."""

    @property
    def last(self) -> Record:
        """Newest record with tokens and seconds."""
        if self.end is not None:
            return self.end
        return self.train[max(self.train)] if self.train else {}

    def planned(self, name: str) -> Any:
        return as_mapping(self.start.get("plan")).get(name)


def read_run(path: Path) -> StageRun:
    """Read a metrics.jsonl; if a step was done twice, the later record counts.

    A start record at step s means that the run was resumed from s, so earlier records of later
    steps are dropped.
    """
    stage, _, tag = path.parent.name.partition("-")
    run = StageRun(stage, tag, path)
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
    """All data that a report is made of."""

    runs: dict[str, StageRun]
    """Runs by stage, in the order of the stages."""
    evaluations: dict[str, list[Measurement]]
    """Measurements by stage, of the run's last measured step (report/eval_<stage>-<tag>.json)."""
    tokenizer: Record | None
    missing: list[str]
    price_per_hour: float | None = None
    long_evaluations: list[Record] = field(default_factory=list)
    """Results of scripts.long_eval; those of all tags, if none was chosen."""


def collect(tag: str | None = None, price_per_hour: float | None = None) -> Material:
    """Find the runs and evaluations under NANOCHAT_BASE_DIR.

    Each stage has the run named `tag`; without a tag, the run that was written last.
    """
    runs: dict[str, StageRun] = {}
    evaluations: dict[str, list[Measurement]] = {}
    missing: list[str] = []
    root = paths.base_dir() / "runs"
    for stage in paths.STAGES:
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
        last = runs[stage].last.get("step") if stage in runs else None
        measured = _read_record(results[-1], missing) if results else []
        measured = [one for one in measured if one["kind"] != "long_context"]
        if measured:
            steps = {one["step"] for one in measured}
            step = last if last in steps else measured[-1]["step"]
            evaluations[stage] = to_show([one for one in measured if one["step"] == step])
            if last is not None and step != last:
                missing.append(
                    f"an evaluation of {stage} at its last step {whole_text(last)}; "
                    f"the one shown is of step {whole_text(step)}"
                )
        elif stage in runs:
            script = "base_eval" if stage == "base" else "chat_eval"
            missing.append(f"an evaluation of {stage} (python -m scripts.{script})")
    long_evaluations = []
    # Earlier versions of long_eval wrote files of their own.
    for path in sorted(paths.report_dir().glob(f"long_eval_*-{tag or '*'}.json")):
        record = _read_json(path, missing)
        long_evaluations += [] if record is None else [record]
    for path in sorted(paths.report_dir().glob(f"eval_*-{tag or '*'}.json")):
        measured = [one for one in _read_record(path, []) if one["kind"] == "long_context"]
        long_evaluations += [one["result"] | one["settings"] for one in to_show(measured)]
    tokenizer = _tokenizer_evaluation(runs, missing)
    return Material(runs, evaluations, tokenizer, missing, price_per_hour, long_evaluations)


def _tokenizer_evaluation(runs: dict[str, StageRun], missing: list[str]) -> Record | None:
    """Find tok_eval's results of the runs' tokenizer; runs of earlier versions do not name it."""
    used = {run.start.get("tokenizer_hash") for run in runs.values()} - {None}
    found = sorted(paths.report_dir().glob("tok_eval*.json"))
    if not used:
        found = [path for path in found if path == paths.tok_eval_path()]
    for path in found:
        measured = _read_json(path, missing)
        if measured is not None and (not used or measured.get("tokenizer_hash") in used):
            return measured
    missing.append("the tokenizer's evaluation (python -m scripts.tok_eval)")
    return None


def _read_record(path: Path, missing: list[str]) -> list[Measurement]:
    try:
        return read_measurements(path)
    except (OSError, ValueError):
        missing.append(f"a readable {path.name}")
        return []


def _read_json(path: Path, missing: list[str]) -> Record | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        missing.append(f"a readable {path.name}")
        return None
    return value
