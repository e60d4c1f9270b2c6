"""Percentile intervals by resampling rows, and of differences by resampling the same rows on both sides.

Efron & Tibshirani 1993, chapters 13 and 16; for metrics of a corpus, Koehn 2004 (https://aclanthology.org/W04-3250).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qingtune.evaluation.metrics import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
SHARE = 0.95  # of resampled values within an interval
SEED = 42
FEWEST_ROWS = 2  # one row says nothing of how rows differ


@dataclass(frozen=True)
class ValueWithInterval:
    """A metric's value, with its interval where there can be one."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Change:
    """A metric before and after; `difference`, after minus before, is None where one is missing or rows differ."""

    name: str
    digits: int
    rows: int
    before: ValueWithInterval | None
    after: ValueWithInterval
    difference: ValueWithInterval | None

    @property
    def sure(self) -> bool | None:
        """Whether the difference's interval excludes zero; None where there is none."""
        if self.difference is None or self.difference.interval is None:
            return None
        low, high = self.difference.interval
        return low > 0 or high < 0


def compare(before: Metric | None, after: Metric, resamples: int = RESAMPLES) -> Change:
    """A metric of one model, or of two on the same rows.

    Args:
        before: None where there is but one.
        after: of the same rows.
        resamples: how many data sets are drawn.

    Raises:
        ValueError: the two are not of the same rows, so that they cannot be paired.
    """
    drawn_after = _resampled(after, resamples)
    change = Change(after.name, after.digits, len(after.rows), None, _with_interval(after.total, drawn_after), None)
    if before is None:
        return change
    if len(before.rows) != change.rows:
        raise ValueError(f"{after.name}: {len(before.rows)} rows before, {change.rows} after")
    drawn_before = _resampled(before, resamples)
    apart = None if drawn_before is None or drawn_after is None else drawn_after - drawn_before
    difference = _with_interval(after.total - before.total, apart)
    return replace(change, before=_with_interval(before.total, drawn_before), difference=difference)


def _resampled(metric: Metric, resamples: int) -> NDArray[np.float64] | None:
    """The metric of each resampled data set, [resamples]; the draws depend on the number of rows alone."""
    count = len(metric.rows)
    if not metric.additive or count < FEWEST_ROWS:
        return None
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.array([metric.value(sums) for sums in draws @ metric.rows])


def _with_interval(value: float, resampled: NDArray[np.float64] | None) -> ValueWithInterval:
    if resampled is None:
        return ValueWithInterval(value, None)
    low, high = np.quantile(resampled, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return ValueWithInterval(value, (float(low), float(high)))
