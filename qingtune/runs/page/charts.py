"""Columns of numbers -> what a chart shows: thinned lines in a 1000 x 1000 box, ticks in percent, values as text.

The box is stretched to whatever place a screen gives it; ticks are text next to it and keep their size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qingtune.runs.page.words import Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOX = 1000  # the side of the box, in its own units
COLUMNS = 400  # in each of which four points of a line are kept at most
MOST_TICKS = 5
MOST_DOTS = 30  # points of a line that are marked
SMOOTHED_FROM = 20  # points; fewer are readable as they are

Show = Callable[[float], str]  # a value as text, with its unit
_Box = tuple[float, float, float, float]  # left, right, bottom and top of what is drawn


@dataclass(frozen=True)
class Line:
    """What is drawn.

    Attributes:
        kind: names its colour: raw, smooth or evaluation.
        label: next to its last value.
        path: SVG path data in the box; gaps where values are missing.
        dots: the same for a dot at each point, where there are few, and where one has no neighbours.
        last: the last value, as text.
        points: JSON of the kept steps and their values as text, for the pointer.
    """

    kind: str
    label: Words
    path: str
    dots: str
    last: str
    points: str


@dataclass(frozen=True)
class Chart:
    """A chart; ticks are (percent of the side from left or top, text)."""

    title: Words
    unit: Words
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


@dataclass(frozen=True)
class Column:
    """A line's numbers: `steps` ascending, `values` NaN where there are none."""

    kind: str
    label: Words
    steps: Sequence[int]
    values: Sequence[float]


def make_chart(
    title: Words, unit: Words, columns: Sequence[Column], show: Show, *, from_zero: bool = False
) -> Chart | None:
    """A chart of lines over the steps; None if there is no number to draw.

    Args:
        unit: of the values, in which they are given.
        from_zero: let the y axis begin at zero.
    """
    lines = [(column, np.asarray(column.steps), np.asarray(column.values, dtype=np.float64)) for column in columns]
    lines = [(column, x, y) for column, x, y in lines if np.isfinite(y).any()]
    if not lines:
        return None
    left, right = min(int(x[0]) for _, x, _ in lines), max(int(x[-1]) for _, x, _ in lines)
    finite = np.concatenate([y[np.isfinite(y)] for _, _, y in lines])
    bottom, top, step = _axis(0.0 if from_zero else float(finite.min()), float(finite.max()))
    exponent = math.floor(math.log10(max(abs(bottom), abs(top))))
    power = exponent if exponent < -2 or exponent > 5 else 0
    if power:
        raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        unit = Words(f"{unit.english} ×10{raised}", f"{unit.chinese} ×10{raised}")
    return Chart(
        title,
        unit,
        _x_ticks(left, right),
        [
            (100 - 100 * number * step / (top - bottom), _tick((bottom + number * step) / 10**power, step / 10**power))
            for number in range(round((top - bottom) / step) + 1)
        ],
        [_line(column, x, y, (left, right, bottom, top), show) for column, x, y in lines],
    )


def smooth(values: Sequence[float]) -> tuple[list[float], int] | None:
    """The exponential moving average over a thirtieth of the points, without the pull of its start.

    Returns:
        The averages, NaN where there is no value, and over how many points they are taken; None for few points.
    """
    if len(values) < SMOOTHED_FROM:
        return None
    window = max(5, round(len(values) / 30))
    share = 2 / (window + 1)
    total = weight = 0.0
    averages: list[float] = []
    for value in values:
        if math.isfinite(value):
            total, weight = (1 - share) * total + share * value, (1 - share) * weight + share
        averages.append(total / weight if math.isfinite(value) else math.nan)
    return averages, window


def _line(column: Column, x: NDArray[np.int64], y: NDArray[np.float64], box: _Box, show: Show) -> Line:
    """SVG path data of the lines from neighbour to neighbour, and of dots, which are lines of no length."""
    kept = _thin(x, y)
    x, y = x[kept], y[kept]
    left, right, bottom, top = box
    across = (x - left) / (right - left) * BOX if right > left else np.full(len(x), BOX / 2)
    down = (1 - (y - bottom) / (top - bottom)) * BOX
    known = np.isfinite(y)
    follows, goes_on = np.append(False, known[:-1]), np.append(known[1:], False)
    few = column.kind != "smooth" and known.sum() <= MOST_DOTS
    dotted = known & (few | ~(follows | goes_on))
    moves = zip(np.where(follows, "L", "M")[known], across[known].tolist(), down[known].tolist(), strict=True)
    dots = zip(across[dotted].tolist(), down[dotted].tolist(), strict=True)
    return Line(
        column.kind,
        column.label,
        "".join(f"{move}{right:.5g} {below:.5g}" for move, right, below in moves),
        "".join(f"M{right:.5g} {below:.5g}h0" for right, below in dots),
        show(float(y[known][-1])),
        json.dumps([x[known].tolist(), [show(value) for value in y[known].tolist()]], separators=(",", ":")),
    )


def _thin(x: NDArray[np.int64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places of the first, last, lowest and highest point of each column of the box, and of a gap in it."""
    if len(x) <= 4 * COLUMNS:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], COLUMNS + 1)[1:-1])
    kept: set[int] = {0, len(x) - 1}
    for start, end in pairwise([0, *edges.tolist(), len(x)]):
        if start == end:
            continue
        part = y[start:end]
        kept |= {start, end - 1}
        if (missing := np.flatnonzero(np.isnan(part))).size:
            kept.add(start + int(missing[0]))
        if np.isfinite(part).any():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    return np.array(sorted(kept))


# --- Axes ------------------------------------------------------------------------------------------------------------


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Where a y axis begins and ends, and its step: 1, 2 or 5 times a power of ten."""
    if high <= low:  # all values alike
        room = abs(low) / 10 or 1.0
        low, high = (low, high + room) if low == 0 else (low - room, high + room)
    step = _step(high - low)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    return next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= MOST_TICKS)


def _x_ticks(left: int, right: int) -> list[tuple[float, str]]:
    """Whole steps, none so near to an end that its text would stand out."""
    if right == left:
        return [(50.0, f"{left:,}")]
    step = max(1, round(_step(right - left)))
    first = math.ceil(left / step) * step
    return [(100 * (place - left) / (right - left), f"{place:,}") for place in range(first, right + 1, step)]


def _tick(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-0", "0") if abs(value) < step / 2 else f"{value:,.{decimals}f}"
