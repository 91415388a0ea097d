"""Accuracies as evaluations write them down: intervals, centred scores, paired tests."""

import math
from collections.abc import Sequence
from typing import Any

from nanochat.errors import UserError


def wilson_interval(correct: float, total: float, z: float = 1.959964) -> tuple[float, float]:
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


def clustered_interval(hits: Sequence[int], samples: int) -> tuple[float, float]:
    """95 % interval of the share of right answers, `samples` of them to each problem.

    hits: right answers of each problem. Answers to one problem resemble each other: what counts is
    how far problems differ. Wilson's interval for the number of independent answers that would have
    this variance: between the number of problems, where all answers to one are alike, and the
    number of answers, where problems are equally hard.
    """
    count = len(hits)
    p = sum(hits) / (count * samples)
    effective = float(count)
    if count > 1 and 0 < p < 1:
        variance = math.fsum((n / samples - p) ** 2 for n in hits) / (count - 1) / count
        most = float(count * samples)
        effective = min(most, max(effective, p * (1 - p) / variance)) if variance else most
    return wilson_interval(p * effective, effective)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: how likely is so uneven a split if both models are as good?

    gained, lost: problems that only the one, only the other model answers rightly.

    >>> mcnemar(1, 9)
    0.021484375
    """
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def centered(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - chance) / (1 - chance)


def task_result(correct: float, total: int, chance: float, **more: Any) -> dict[str, Any]:
    """How every evaluation writes down a task's accuracy; `ci` in `more` replaces Wilson's."""
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


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k samples is right), arXiv 2107.03374.

    1 - C(samples - correct, k) / C(samples, k), exactly. Needs 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs at least {k} samples of each prompt, got {samples}")
    if not 0 <= correct <= samples:
        raise UserError(f"{correct} correct of {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
