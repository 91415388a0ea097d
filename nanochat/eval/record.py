"""Record of the measurements on a run's checkpoints: `report/eval_<stage>-<tag>.json`.

A measurement is a dictionary: "kind" (bpb, samples, text, core, task, long_context), "name", "step"
and "weights" of the checkpoint, "settings" (all that the result depends on beside the model),
"result" and "time". A new measurement replaces an old one only if all but result and time are
equal. A quick look at five problems therefore never replaces the whole test.
"""

import hashlib
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from nanochat import paths
from nanochat.eval.results import mcnemar

Measurement: TypeAlias = dict[str, Any]

CHAT_CORE: dict[str, dict[str, int | None]] = {
    # The tasks of nanochat's own ChatCORE, with the sizes of their test splits.
    "nanochat's tasks": {
        "arc:easy": 2376,
        "arc:challenge": 1172,
        "mmlu": 14042,
        "gsm8k": 1319,
        "humaneval": 164,
        "spellingbee": None,  # as many words as the word list has for the split
    },
    # Tasks that need no download.
    "generated tasks": {"simplespelling": None, "spellingbee": None, "arithmetic": 256},
}
"""Sizes of the tasks' whole test splits, by set and task; None: any size is the whole split."""
_CHAT_CORE_TOKENS = 512
"""Smallest limit on the length of answers, in tokens, with which a task counts for ChatCORE."""
_LIMITS = {"problems", "max_problems", "max_per_task", "digest", "files"}
"""Settings in which a quick look and the whole measurement differ."""


def evaluation_path(stage: str, tag: str) -> Path:
    return paths.report_dir() / f"eval_{stage}-{tag}.json"


def weights_digest(meta: Mapping[str, Any]) -> str | None:
    """SHA-256 of a checkpoint's weights; a run begun anew with the same tag has another one."""
    files: Mapping[str, Mapping[str, str]] = meta.get("files", {})
    return files.get("model.safetensors", {}).get("sha256")


def read_measurements(path: Path) -> list[Measurement]:
    """Read all measurements of a record, of all checkpoints of the run; [] if there is no file.

    Earlier versions kept one checkpoint's results by the task's name. These are converted and
    marked with "legacy". Raises ValueError if the file is not a record.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if not isinstance(known, dict):
        raise ValueError(f"{path} is no record of measurements")
    if "measured" not in known:
        return _converted(known)
    return [one for one in known["measured"] if _is_measurement(one)]


def of_checkpoint(meta: Mapping[str, Any]) -> list[Measurement]:
    """Read the measurements of the checkpoint with this metadata (stage, tag, step, files)."""
    try:
        known = read_measurements(evaluation_path(meta["stage"], meta["tag"]))
    except ValueError:  # incomplete, or written by hand
        return []
    weights = weights_digest(meta)
    return [
        one
        for one in known
        if one["step"] == meta["step"] and _same_weights(one.get("weights"), weights)
    ]


def find(
    measured: Sequence[Measurement], kind: str, name: str, settings: Mapping[str, Any]
) -> Measurement | None:
    """Find the measurement with exactly these settings, or None."""
    for one in measured:
        if (one["kind"], one["name"], one["settings"]) == (kind, name, settings):
            return one
    return None


def record(
    meta: Mapping[str, Any],
    kind: str,
    name: str,
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    problems: Sequence[Mapping[str, Any]] = (),
) -> Measurement:
    """Write a measurement of the checkpoint with this metadata into the record; returns it.

    problems: results of the task's problems, which are written to a file beside the record.
    """
    new: Measurement = {
        "kind": kind,
        "name": name,
        "step": meta["step"],
        "weights": weights_digest(meta),
        "settings": json.loads(json.dumps(settings)),
        "result": json.loads(json.dumps(result)),
        "time": round(time.time()),
    }
    if problems:
        key = hashlib.sha256(json.dumps([name, new["weights"], settings]).encode()).hexdigest()
        title = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60]
        folder = f"{meta['stage']}-{meta['tag']}-step_{meta['step']:06d}"
        new["problems"] = f"{folder}/{title}-{key[:8]}.jsonl"
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in problems]
        paths.atomic_write(problems_path(new), "".join(lines))
    path = evaluation_path(meta["stage"], meta["tag"])
    with paths.lock(path):  # without it, two evaluations at once would lose results
        try:
            known = read_measurements(path)
        except ValueError:
            known = []
        measured = [*(old for old in known if not _replaces(new, old)), new]
        content = {"stage": meta["stage"], "tag": meta["tag"], "measured": measured}
        paths.atomic_write(path, json.dumps(content, indent=2) + "\n")
    return new


def _replaces(new: Measurement, old: Measurement) -> bool:
    if old["step"] != new["step"]:
        return False
    if not _same_weights(old.get("weights"), new["weights"]):
        return True  # the run was begun anew
    if (old["kind"], old["name"]) != (new["kind"], new["name"]):
        return False
    if old.get("legacy"):
        return not is_quick(new)

    def identity(one: Measurement) -> Measurement:
        # CORE depends on which task files exist, so a new score replaces one of other files.
        left_out = {"files"} if one["kind"] == "core" else set()
        return {key: value for key, value in one["settings"].items() if key not in left_out}

    return identity(old) == identity(new)


def _same_weights(one: str | None, other: str | None) -> bool:
    return None in (one, other) or one == other


def problems_path(one: Measurement) -> Path:
    return paths.report_dir() / "problems" / str(one["problems"])


def compare(before: Measurement, after: Measurement) -> dict[str, Any] | None:
    """Compare two measurements of a task by McNemar's test: {"gained", "lost", "p"}.

    The result is None if the settings differ, if problems have several answers, or if a file of
    problems is missing or incomplete.
    """
    if (before["name"], before["settings"]) != (after["name"], after["settings"]):
        return None
    if before["settings"].get("num_samples", 1) != 1:
        return None
    try:
        first, second = (
            {one["problem"]: bool(one["right"]) for one in map(json.loads, lines)}
            for lines in (
                problems_path(side).read_text(encoding="utf-8").splitlines()
                for side in (before, after)
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if first.keys() != second.keys():
        return None
    gained = sum(second[key] and not first[key] for key in first)
    lost = sum(first[key] and not second[key] for key in first)
    return {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def is_quick(one: Measurement) -> bool:
    """True if only a part of what could be measured was measured."""
    settings = one["settings"]
    problems, total = settings.get("problems"), settings.get("of")
    if isinstance(problems, int) and isinstance(total, int):
        return problems < total
    return settings.get("max_problems") is not None or settings.get("max_per_task") is not None


def to_show(measured: Sequence[Measurement]) -> list[Measurement]:
    """Leave out quick looks for which there is a whole measurement with the same settings."""

    def question(one: Measurement) -> str:
        settings = {key: value for key, value in one["settings"].items() if key not in _LIMITS}
        return json.dumps([one["kind"], one["name"], one["step"], settings], sort_keys=True)

    whole = {question(one) for one in measured if not is_quick(one)}
    return [one for one in measured if not is_quick(one) or question(one) not in whole]


def labels(measured: Sequence[Measurement]) -> list[str]:
    """Describe each measurement in words; two have the same label only if their settings agree."""
    told = [_described(one) for one in measured]
    groups: dict[str, list[int]] = defaultdict(list)
    for number, label in enumerate(told):
        groups[label].append(number)
    result = list(told)
    for label, numbers in groups.items():
        alike = [measured[number]["settings"] for number in numbers]
        keys = dict.fromkeys(key for settings in alike for key in settings)
        differing = [key for key in keys if any(s.get(key) != alike[0].get(key) for s in alike)]
        for number in numbers:
            settings = measured[number]["settings"]
            more = [f"{key.replace('_', ' ')} {str(settings.get(key))[:12]}" for key in differing]
            result[number] = ", ".join([label, *more])
    return result


def _described(one: Measurement) -> str:
    """Describe a measurement: `mmlu, split val, 5 of 1,531 problems`."""
    kind, settings, result = one["kind"], one["settings"], one["result"]
    if kind == "bpb":
        corpus = settings.get("corpus", "corpus not recorded")
        tokens = result.get("tokens")
        counted = f", {tokens:,} tokens" if isinstance(tokens, int) else ""
        return f"bits per byte, {corpus}, {one['name']}{counted}"
    if kind == "core":
        label = "CORE"
        if "core" not in result:
            counts = [result.get(key, "?") for key in ("num_tasks", "num_tasks_total")]
            label += f", partial ({counts[0]} of {counts[1]} tasks)"
        if is_quick(one):
            label += f", at most {settings['max_per_task']} items a task"
        return label
    parts = [one["name"]]
    if kind == "task":
        if settings.get("split", "test") != "test":
            parts.append(f"split {settings['split']}")
        if is_quick(one):
            total = f" of {settings['of']:,}" if isinstance(settings.get("of"), int) else ""
            parts.append(f"{result.get('total', '?')}{total} problems")
        if settings.get("shots"):
            parts.append(f"{settings['shots']} shots")
        if settings.get("num_samples", 1) != 1:
            parts.append(f"{settings['num_samples']} samples")
        if settings.get("temperature"):
            parts.append(f"temperature {settings['temperature']:g}")
    return ", ".join(parts)


def chat_core(
    measured: Sequence[Measurement], tasks: Mapping[str, int | None]
) -> tuple[float, int]:
    """Compute a set's (mean centred accuracy, number of tasks counted).

    A task counts if it was measured on the whole test split, without examples, with the most likely
    answer. The mean is the set's score if all its tasks are counted, and nan if none is.
    """
    scores = []
    for name, size in tasks.items():
        counted = [
            one["result"]["centered"]
            for one in measured
            if (one["kind"], one["name"]) == ("task", name)
            and one["settings"].get("split") == "test"
            and not is_quick(one)
            and size in (None, one["result"].get("total"))
            and not one["settings"].get("shots")
            and not one["settings"].get("temperature")
            and one["settings"].get("max_tokens", _CHAT_CORE_TOKENS) >= _CHAT_CORE_TOKENS
        ]
        scores += counted[-1:]
    return math.fsum(scores) / len(scores) if scores else math.nan, len(scores)


def chat_core_texts(measured: Sequence[Measurement]) -> dict[str, str]:
    """Scores by name: `ChatCORE of nanochat's tasks` is `0.4012` or `0.4012, partial (4 of 6)`.

    Sets without a counted task are left out.
    """
    texts = {}
    for name, tasks in CHAT_CORE.items():
        score, counted = chat_core(measured, tasks)
        if counted:
            partial = f", partial ({counted} of {len(tasks)})" if counted < len(tasks) else ""
            texts[f"ChatCORE of {name}"] = f"{score:.4f}{partial}"
    return texts


# Files of earlier versions, or from elsewhere


def _is_measurement(one: Any) -> bool:
    types = {"kind": str, "name": str, "settings": dict, "result": dict}
    return (
        isinstance(one, dict)
        and "step" in one
        and all(isinstance(one.get(key), kind) for key, kind in types.items())
    )


_TASK_SETTINGS = (
    "split",
    "max_problems",
    "num_samples",
    "temperature",
    "top_k",
    "max_tokens",
    "seed",
    "dtype",
)


def _converted(known: Mapping[str, Any]) -> list[Measurement]:
    """Convert a record of an earlier version."""
    found: list[Measurement] = []

    def add(kind: str, name: str, settings: Any, result: Any) -> None:
        one = {
            "kind": kind,
            "name": name,
            "step": known.get("step"),
            "weights": known.get("weights"),
            "settings": settings,
            "result": result,
            "legacy": True,
        }
        if _is_measurement(one):
            found.append(one)

    asked = known.get("asked")
    asked = asked if isinstance(asked, dict) else {}
    bpb = known.get("bpb")
    for split, value in (bpb if isinstance(bpb, dict) else {"val": bpb}).items():
        if isinstance(value, int | float):
            add("bpb", split, {"split": split, **asked.get("bpb", {})}, {"bpb": value})
    if isinstance(known.get("samples"), list):
        add("samples", "samples", {}, {"samples": known["samples"]})
    details = known.get("core_tasks")
    details = details if isinstance(details, dict) else {}
    # If both exist, the tasks tell which one came last.
    keys = ("core", "core_partial")
    key = next((k for k in keys if k in details), next((k for k in keys if k in known), None))
    if key is not None:
        limit = details.get("max_per_task")
        settings = {**asked.get("core", {}), "max_per_task": limit}
        add("core", "CORE", settings, {**details, key: known.get(key)})
    results = known.get("results")
    if isinstance(known.get("chat_core"), int | float):  # mean of the tasks measured
        count = len(results) if isinstance(results, dict) else 0
        name = f"mean of {count} tasks, centred"
        add("chat_core", name, {}, {"chat_core": known["chat_core"]})
    for name, result in (results if isinstance(results, dict) else {}).items():
        if isinstance(result, dict):
            settings = {key: result[key] for key in _TASK_SETTINGS if key in result}
            rest = {key: value for key, value in result.items() if key not in settings}
            add("task", name, settings, rest)
    return found
