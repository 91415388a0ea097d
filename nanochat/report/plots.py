"""A report's curves as <svg> elements in the page's colours."""

import io
import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from nanochat.report.blocks import Plot

NUM_COLORS = 8
_MAX_POINTS = 400
_INK, _GRID = "#010203", "#040506"
_SERIES = [f"#0a0b0{i}" for i in range(NUM_COLORS)]
"""Stand-ins that become CSS variables, so that a plot follows the page's colour scheme."""


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
        for number, (_, steps, values) in enumerate(plot.series):
            color = _SERIES[number % NUM_COLORS]
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
