"""Intervals against what theory says of them, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from qingtune.evaluation.intervals import compare
from qingtune.evaluation.metrics import Metric, Outcome, metrics_of


def mean_of(values: np.ndarray) -> Metric:
    rows = np.stack([values, np.ones_like(values)], 1)
    return Metric("mean", rows, lambda sums: float(sums[0] / sums[1]))


def test_an_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = compare(None, mean_of(values)).after.interval or (0, 0)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_pairing_sees_a_small_gain_beneath_large_differences_of_rows() -> None:
    draw = np.random.default_rng(2)
    before = draw.normal(0, 10, 100)
    change = compare(mean_of(before), mean_of(before + 0.5 + draw.normal(0, 0.5, 100)))
    assert change.before is not None
    assert change.difference is not None
    assert change.sure
    assert change.difference.interval is not None
    assert change.before.interval is not None
    assert change.before.interval[1] - change.before.interval[0] > 3  # which alone would hide it
    assert change.difference.interval[1] - change.difference.interval[0] < 0.5


def test_no_gain_is_not_sure() -> None:
    draw = np.random.default_rng(3)
    change = compare(mean_of(draw.normal(0, 1, 100)), mean_of(draw.normal(0, 1, 100)))
    assert change.sure is False


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        low, high = compare(None, mean_of(np.random.default_rng(seed).normal(0, 1, 40))).after.interval or (1, 1)
        held += low <= 0 <= high
    assert 178 <= held <= 198


def test_the_same_twice() -> None:
    values = np.arange(20.0)
    assert compare(mean_of(values), mean_of(values + 1)) == compare(mean_of(values), mean_of(values + 1))


@pytest.mark.parametrize("metric", ["loss", "BLEU", "chrF", "ROUGE-L", "length ratio"])
def test_corpus_metrics_are_resampled_as_a_whole(metric: str) -> None:
    texts = ["the cat sat on the mat", "a dog ran by the sea all day", "bread is baked at seven", "rain and more rain"]
    outcomes = [Outcome(2.0 + n, 5, text, True, texts[0] + " " + text[:9]) for n, text in enumerate(texts * 3)]
    found = next(one for one in metrics_of(outcomes) if one.name == metric)
    change = compare(None, found)
    assert change.after.interval is not None
    assert change.after.interval[0] < change.after.value < change.after.interval[1]


def test_no_interval_where_there_can_be_none() -> None:
    assert compare(None, mean_of(np.array([1.0]))).after.interval is None
    distinct = next(one for one in metrics_of([Outcome(answer="a b")] * 5) if one.name == "distinct-1")
    change = compare(distinct, distinct)
    assert change.difference is not None
    assert (change.difference.value, change.difference.interval, change.sure) == (0, None, None)


def test_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="3 rows before, 4 after"):
        compare(mean_of(np.arange(3.0)), mean_of(np.arange(4.0)))
