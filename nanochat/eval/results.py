"""Accuracies with their intervals, centred scores, and tests of differences."""

import math
from collections.abc import Sequence
from typing import Any

from nanochat.errors import UserError


def wilson_interval(correct: float, total: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 %.

    >>> [round(x, 4) for x in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if total == 0:
        return 0.0, 1.0
    p, z = correct / total, 1.959964
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def clustered_interval(hits: Sequence[int], samples: int) -> tuple[float, float]:
    """Compute the 95 % interval of the share of right answers, `samples` to each problem.

    hits: number of right answers to each problem. Answers to one problem resemble each other, so
    the interval depends on how much the problems differ. It is Wilson's interval for the number of
    independent answers that would have the same variance. That number lies between the number of
    problems (all answers to a problem are alike) and the number of answers (all problems are
    equally hard).
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
    """P-value of McNemar's exact two-sided test: the probability of a split at least this uneven
    between two equally good models.

    gained, lost: numbers of problems that only one, or only the other model answers rightly.

    >>> mcnemar(1, 9)
    0.021484375
    """
    n = gained + lost
    tail, ways = 0, 1  # ways: n choose k, each from the one before
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def centered(accuracy: float, chance: float) -> float:
    """Centre an accuracy: 0 for guessing, 1 for all right."""
    return (accuracy - chance) / (1 - chance)


def task_result(correct: float, total: int, chance: float, **more: Any) -> dict[str, Any]:
    """Make the dictionary of a task's accuracy for the record; `ci` in `more` replaces Wilson's."""
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
    """Unbiased estimate of P(at least one of k samples is right), arXiv 2107.03374.

    It is 1 - C(samples - correct, k) / C(samples, k), computed exactly. k must be from 1 to
    samples; UserError otherwise.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs at least {k} samples of each prompt, got {samples}")
    if not 0 <= correct <= samples:
        raise UserError(f"{correct} correct of {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
