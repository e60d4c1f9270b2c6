"""Tokens per second of a run: the one definition, for whoever shows or compares it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

_Line = TypeVar("_Line")


def after_warm_up(lines: Sequence[_Line]) -> Sequence[_Line]:
    """The logged lines that are timed: all but the first, in which the machine warms up; a single line counts."""
    return lines[1:] or lines


def tokens_per_second(tokens: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The speed over the logged lines after the warm-up.

    Args:
        tokens: all tokens read, of each logged line; NaN where the line does not say.
        seconds: what they took.

    Returns:
        None where no time was logged.
    """
    pairs = [pair for pair in zip(tokens, seconds, strict=True) if math.isfinite(sum(pair))]
    timed = after_warm_up(pairs)
    took = sum(second for _, second in timed)
    return sum(count for count, _ in timed) / took if took > 0 else None
