"""Percentile intervals by resampling rows, and of differences by resampling the same rows on both sides.

Efron & Tibshirani 1993, chapters 13 and 16; for metrics of a corpus, Koehn 2004 (https://aclanthology.org/W04-3250).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qingtune.evaluation.metrics import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
SHARE = 0.95  # of resampled values within an interval
SEED = 42
FEWEST_ROWS = 2  # one row says nothing of how rows differ

Interval = tuple[float, float]


@dataclass(frozen=True)
class ValueWithInterval:
    """A metric's value, with its interval where there can be one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Change:
    """A metric before and after.

    Attributes:
        difference: after minus before; None where one of them is missing, and where rows differ.
        sure: whether the difference's interval excludes zero; None without an interval.
    """

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
    if before is not None and before.rows.shape[0] != after.rows.shape[0]:
        raise ValueError(f"{after.name}: {before.rows.shape[0]} rows before, {after.rows.shape[0]} after")
    of_after = _resampled(after, resamples)
    of_before = None if before is None else _resampled(before, resamples)
    difference = None
    if before is not None:
        apart = None if of_before is None or of_after is None else of_after - of_before
        difference = ValueWithInterval(after.total - before.total, _interval(apart))
    return Change(
        name=after.name,
        digits=after.digits,
        rows=after.rows.shape[0],
        before=None if before is None else ValueWithInterval(before.total, _interval(of_before)),
        after=ValueWithInterval(after.total, _interval(of_after)),
        difference=difference,
    )


def _resampled(metric: Metric, resamples: int) -> NDArray[np.float64] | None:
    """The metric of each resampled data set, [resamples]; the draws depend on the number of rows alone."""
    count = metric.rows.shape[0]
    if not metric.additive or count < FEWEST_ROWS:
        return None
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.array([metric.value(sums) for sums in draws @ metric.rows])


def _interval(values: NDArray[np.float64] | None) -> Interval | None:
    if values is None:
        return None
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)
