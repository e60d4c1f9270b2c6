"""Measures of a run, each defined once for whoever shows or compares it: tokens per second, loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_Line = TypeVar("_Line")


def after_warm_up(lines: Sequence[_Line]) -> Sequence[_Line]:
    """The logged lines that are timed: all but the first, in which the machine warms up; a single line counts."""
    return lines[1:] or lines


def tokens_per_second(tokens: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The speed over the logged lines after the warm-up; None where no time was logged.

    Args:
        tokens: all tokens read, of each logged line; NaN where the line does not say.
        seconds: what they took.
    """
    pairs = [pair for pair in zip(tokens, seconds, strict=True) if math.isfinite(sum(pair))]
    timed = after_warm_up(pairs)
    took = sum(second for _, second in timed)
    return sum(count for count, _ in timed) / took if took > 0 else None


def loss_of_result(results: Mapping[str, Any], *, best_kept: bool) -> float | None:
    """The evaluation loss of the weights that a run kept, in nats per trained token; None where nothing was evaluated.

    Args:
        results: of the run's record.
        best_kept: whether the weights of the best evaluation were kept (load_best_model_at_end), if there was one.
    """
    best = results.get("best_eval_loss") if best_kept else None
    return results.get("eval_loss") if best is None else best


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
