"""Blocks that a report consists of, independent of its format, and formatting of numbers."""

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeAlias

from nanochat.progress import duration_text

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    heat: bool = False
    """True if cells are shares from 0 to 1 that get a colour."""


@dataclass(frozen=True)
class Quote:
    """A text that a model wrote, shown unchanged."""

    label: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One panel of curves; `series` are (name, steps, values)."""

    title: str
    series: list[tuple[str, list[int], list[float]]]
    from_zero: bool = False
    smooth: bool = False


Block: TypeAlias = Text | Table | Quote | Plot


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


def as_mapping(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float | None:
    """Return a finite number as a float, else None; files may hold NaN, null or anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's integers have no limit
        return None


def count_text(value: Any) -> str:
    """Format a count: 12345678 -> 12.3 M."""
    number = as_number(value)
    if number is None:
        return ""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            scale = 1e3 if unit == "k" else limit
            digits = f"{number / scale:.3g}" if number < 1000 * scale else f"{number / scale:,.0f}"
            return f"{digits}\N{NO-BREAK SPACE}{unit}"
    return f"{number:,.0f}"


def whole_text(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:,.0f}"


def fixed_text(value: Any, digits: int) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.{digits}f}"


def flops_text(value: float | None) -> str:
    return f"{value:.2e}" if value else ""


def memory_text(value: float | None) -> str:
    return f"{value / 2**30:.2f}\N{NO-BREAK SPACE}GiB" if value else ""


def duration_with_unit(value: Any) -> str:
    seconds = as_number(value)
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    return f"{duration_text(seconds)}\N{NO-BREAK SPACE}{'h' if round(seconds) >= 3600 else 'min'}"


def time_text(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return ""
    try:
        return datetime.fromtimestamp(number, timezone.utc).strftime("%Y-%m-%d (%H:%M)")
    except (OverflowError, OSError, ValueError):
        return ""


def plain_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
