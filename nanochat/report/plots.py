"""Curves of a report as <svg> elements: polylines in the page's colours (CSS variables)."""

import html
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from nanochat.report.blocks import Plot, tick_text

NUM_COLORS = 8
_MAX_POINTS = 400
_MAX_TITLES = 40
"""Number of points of a curve that show their value under the mouse; the last is one of them."""
_WIDTH, _HEIGHT = 340, 190
_TOP, _RIGHT, _BOTTOM = 10, 14, 34


def plot_svg(plot: Plot) -> str:
    """Draw the plot as an <svg> element with axes, and values as titles of points.

    The curve of series i has the CSS variable --c<i> as its colour, i modulo NUM_COLORS.
    """
    curves = []  # (number, steps, values, thin), drawn in this order
    for number, (_, steps, values) in enumerate(plot.series):
        values = [max(-1e300, min(1e300, value)) for value in values]  # their sums are finite
        smooth = plot.smooth and len(values) >= 10
        if smooth:
            curves.append((number, *thinned(steps, values), True))
        curves.append((number, *thinned(steps, smoothed(values) if smooth else values), False))
    left, right = _span([x for _, xs, _, _ in curves for x in xs], 0.02, 1.0)
    heights = [y for _, _, ys, _ in curves for y in ys]
    low, high = _span([*heights, 0.0] if plot.from_zero else heights, 0.05, 0.0)
    if plot.from_zero:
        low = min(0.0, *heights)
    rows = [(y, _axis_number(y)) for y in axis_ticks(low, high)]
    columns = [(x, f"{x:,.0f}") for x in axis_ticks(left, right, whole=True)]
    margin = 12 + 6.2 * max((len(label) for _, label in rows), default=0)

    def across(x: float) -> float:
        return margin + (x - left) / (right - left) * (_WIDTH - _RIGHT - margin)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for y, label in rows:
        at = f"{down(y):.1f}"
        parts.append(f'<path class="grid" d="M{margin:.1f} {at}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{margin - 6:.1f}" y="{at}" dy=".35em" class="y">{label}</text>')
    for x, label in columns:
        parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - 20}" class="x">{label}</text>')
    middle = (margin + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" class="x">step</text>')
    parts.append(
        f'<path class="axis" d="M{margin:.1f} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
    )
    for number, xs, ys, thin in curves:
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(xs, ys, strict=True))
        kind = "curve thin" if thin else "curve"
        color = f"var(--c{number % NUM_COLORS})"
        parts.append(f'<polyline class="{kind}" style="stroke:{color}" points="{points}"/>')
    for number, xs, ys, thin in curves:
        if thin:
            continue
        name, color = plot.series[number][0], f"var(--c{number % NUM_COLORS})"
        every = math.ceil(len(xs) / _MAX_TITLES)
        seen = "" if len(xs) < 12 else " unseen"
        for x, y in list(zip(xs, ys, strict=True))[::-every]:
            title = html.escape(f"{name + ', ' if name else ''}step {x:,.0f}: {tick_text(y)}")
            parts.append(
                f'<circle class="point{seen}" style="fill:{color}" cx="{across(x):.1f}" '
                f'cy="{down(y):.1f}" r="3"><title>{title}</title></circle>'
            )
    alt = html.escape(f"Curve of {plot.title} over the steps")
    return (
        f'<svg role="img" aria-label="{alt}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{''.join(parts)}</svg>"
    )


def _span(values: Sequence[float], share: float, least: float) -> tuple[float, float]:
    """Ends of an axis, `share` of its length beyond the values on both sides; length above 0."""
    low, high = min(values), max(values)
    margin = share * (high - low) if high > low else least or 0.05 * abs(low) or 0.05
    return low - margin, high + margin


def axis_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times 10^k from `low` to `high`, at most seven."""
    rough = max((high - low) / 5, 1.0) if whole else (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next((f * power for f in factors if f * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _axis_number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.8g}M"
    return f"{value / 1e3:.8g}k" if abs(value) >= 1e4 else f"{value:.8g}"


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Reduce a curve to at most _MAX_POINTS points, means of equal parts of it."""
    if len(steps) <= _MAX_POINTS:
        return list(map(float, steps)), list(values)
    edges = [k * len(steps) // _MAX_POINTS for k in range(_MAX_POINTS + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return (
        [math.fsum(steps[p]) / len(steps[p]) for p in parts],
        [math.fsum(values[p]) / len(values[p]) for p in parts],
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Smooth a curve by means over a fiftieth of it on both sides, which cause no lag.

    A curve of few points is returned unchanged.
    """
    if len(values) < 10:
        return list(values)
    half = min(50, max(2, len(values) // 50))
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]
