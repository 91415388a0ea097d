"""Schedules as functions of the step: their shape whatever the length of the run."""

import itertools
import math

import pytest

from nanochat.plan import lr_multiplier, muon_momentum


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("warmdown", [0.0, 0.2, 1.0])
def test_rates_are_positive_and_at_most_one(num_steps: int, warmup: float, warmdown: float) -> None:
    rates = [
        lr_multiplier(step, num_steps, warmup=warmup, warmdown=warmdown)
        for step in range(num_steps)
    ]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_shape_of_a_long_run() -> None:
    rates = [lr_multiplier(s, 1000, warmup=0.02, warmdown=0.5, final=0.1) for s in range(1000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[9] == pytest.approx(0.5)
    assert rates[19:501] == [1.0] * 482
    assert rates[750] == pytest.approx(0.55)
    assert rates[999] == pytest.approx(0.1 + 0.9 / 500)
    # One step after the last it would be `final`: the same slope all the way.
    slopes = [a - b for a, b in itertools.pairwise(rates[500:])]
    assert slopes == pytest.approx([0.9 / 500] * len(slopes))


def test_linear_to_zero_over_the_whole_run() -> None:
    """This is SFT's schedule."""
    rates = [lr_multiplier(s, 10, warmup=0.0, warmdown=1.0) for s in range(10)]
    assert rates == pytest.approx([1 - s / 10 for s in range(10)])


def test_steps_outside_the_run_are_clamped() -> None:
    """Never below zero, even if somebody asks for a step too many."""
    inside = lr_multiplier(9, 10, warmup=0.1, warmdown=0.5)
    assert lr_multiplier(10, 10, warmup=0.1, warmdown=0.5) == inside
    assert lr_multiplier(10_000, 10, warmup=0.1, warmdown=0.5) == inside
    assert lr_multiplier(-5, 10, warmup=0.5, warmdown=0.5) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="num_steps 0"):
        lr_multiplier(0, 0, warmup=0, warmdown=0)


@pytest.mark.parametrize("num_steps", [1, 5, 30, 2000])
def test_momentum_rises_and_falls_as_fractions_of_the_run(num_steps: int) -> None:
    values = [muon_momentum(s, num_steps, low=0.85, high=0.95) for s in range(num_steps)]
    assert values[0] == 0.85
    assert all(0.85 <= value <= 0.95 + 1e-12 for value in values)
    if num_steps >= 30:
        assert max(values) == pytest.approx(0.95)
    if num_steps == 2000:
        assert values[100] == pytest.approx(0.9)
        assert values[200] == pytest.approx(0.95)
        assert values[1980] == pytest.approx(0.9)
    assert muon_momentum(num_steps, num_steps, low=0.85, high=0.95) == 0.85
    assert math.isclose(
        muon_momentum(num_steps // 2, num_steps, low=0.7, high=0.7, warmup=0, cooldown=0), 0.7
    )
