"""Results of evaluations: intervals, centred scores, and the file they are kept in."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanochat import paths


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, by default at 95 %.

    >>> [round(x, 4) for x in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def centered(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - chance) / (1 - chance)


def task_result(correct: float, total: int, chance: float, **more: Any) -> dict[str, Any]:
    """How every evaluation writes down a task's accuracy."""
    accuracy = correct / total
    return {
        "accuracy": accuracy,
        "correct": correct,
        "total": total,
        "ci": list(wilson_interval(correct, total)),
        "chance": chance,
        "centered": centered(accuracy, chance),
        **more,
    }


def evaluation_path(stage: str, tag: str) -> Path:
    return paths.report_dir() / f"eval_{stage}-{tag}.json"


def weights_digest(meta: Mapping[str, Any]) -> str | None:
    """What tells a checkpoint from another of the same name and step (a run begun anew)."""
    files: Mapping[str, Mapping[str, str]] = meta.get("files", {})
    return files.get("model.safetensors", {}).get("sha256")


def read_evaluation(stage: str, tag: str, step: int, weights: str | None = None) -> dict[str, Any]:
    """What is known of this checkpoint; of another step of its run nothing is: {}.

    With `weights` (of `weights_digest`) nothing either of other weights.
    """
    with suppress(FileNotFoundError, ValueError):  # none yet, or a torn one
        known = json.loads(evaluation_path(stage, tag).read_text(encoding="utf-8"))
        if (
            isinstance(known, dict)
            and known.get("step") == step
            and (weights is None or known.get("weights") == weights)
        ):
            return known
    return {}


def record_evaluation(
    stage: str,
    tag: str,
    step: int,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    weights: str | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Add `results` (task -> task_result) and other values to what is known; returns all of it."""
    path = evaluation_path(stage, tag)
    with paths.lock(path):  # two evaluations at once would forget each other's results
        known = read_evaluation(stage, tag, step, weights)
        merged = {
            **known,
            "stage": stage,
            "tag": tag,
            "step": step,
            **({"weights": weights} if weights else {}),
            **values,
            "results": {**known.get("results", {}), **(results or {})},
        }
        paths.atomic_write(path, json.dumps(merged, indent=2) + "\n")
    return merged
