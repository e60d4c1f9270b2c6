"""Measured trials -> a comparison: spread over seeds, quality relative to a reference, setups that do not differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qingtune.evaluation.compare.setups import Setup
from qingtune.evaluation.compare.trial import Numbers, TrialOutcome
from qingtune.runs.measures import perplexity

# In nats: a quality is a share of what the reference learnt, and 16-bit losses of the same weights differ by 0.002.
LEAST_GAIN = 0.05

_MEASURES: dict[str, Callable[[Numbers], float]] = {
    "peak_bytes": lambda numbers: numbers.peak_bytes,
    "trained_share": lambda numbers: numbers.trained_parameters / numbers.parameters,
    "tokens_per_second": lambda numbers: numbers.tokens_per_second,
    "seconds": lambda numbers: numbers.seconds,
    "eval_loss_before": lambda numbers: numbers.eval_loss_before,
    "eval_loss": lambda numbers: numbers.eval_loss,
    "perplexity_before": lambda numbers: perplexity(numbers.eval_loss_before),
    "perplexity": lambda numbers: perplexity(numbers.eval_loss),
}


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    median: float
    least: float
    most: float

    @property
    def range(self) -> float:
        """Largest less smallest."""
        return self.most - self.least


@dataclass(frozen=True)
class SetupRow:
    """A setup's trials together.

    Attributes:
        outcomes: seed -> how its trial ended.
        measured: each of _MEASURES over the finished trials; empty where none is finished. With a reference also:
            quality: how much of the reference's way from the base model's loss it came, as a share; seed by seed
            (before - after) / (before - reference's after), `before` being the reference's. Missing where the reference
            learnt too little for that (LEAST_GAIN, and its range over seeds).
            perplexity_ratio: its perplexity over the reference's, seed by seed.
        alike: whether its eval_loss differs from the reference's by no more than the larger of their ranges over seeds;
            None with fewer than two seeds, or for the reference itself.
    """

    setup: Setup
    outcomes: Mapping[int, TrialOutcome]
    measured: Mapping[str, Spread]
    alike: bool | None = None

    @property
    def numbers(self) -> dict[int, Numbers]:
        """Of the finished trials, by seed."""
        return {seed: outcome.numbers for seed, outcome in self.outcomes.items() if outcome.numbers}


@dataclass(frozen=True)
class Comparison:
    """All setups, and the one that quality is relative to: full training, else the best.

    Attributes:
        best: the row of the lowest median eval_loss; None where no trial is finished.
        alike_best: finished rows whose eval_loss differs from the best's by no more than the larger of their ranges.
    """

    rows: list[SetupRow]
    reference: SetupRow | None
    best: SetupRow | None
    alike_best: list[SetupRow]


def compare_outcomes(outcomes: Sequence[tuple[Setup, Mapping[int, TrialOutcome]]]) -> Comparison:
    """Put measurements together; the order of the setups is kept."""
    rows = [_over_seeds(SetupRow(setup, of_seeds, {})) for setup, of_seeds in outcomes]
    finished = [row for row in rows if row.measured]
    if not finished:
        return Comparison(rows, None, None, [])
    best = min(finished, key=_median_loss)
    reference = min((row for row in finished if row.setup.method == "full"), key=_median_loss, default=best)
    related = [_relative(row, reference) if row.measured else row for row in rows]
    here = {row.setup.name: row for row in related}
    alike = [row for row in related if row.measured and row.setup != best.setup and _within_spread(row, best)]
    return Comparison(related, here[reference.setup.name], here[best.setup.name], alike)


def _median_loss(row: SetupRow) -> float:
    return row.measured["eval_loss"].median


def _within_spread(one: SetupRow, two: SetupRow) -> bool | None:
    """Whether medians of eval_loss differ by no more than the larger range over seeds; None where none is known."""
    if min(len(one.numbers), len(two.numbers)) < 2:
        return None
    most = max(row.measured["eval_loss"].range for row in (one, two))
    return abs(_median_loss(one) - _median_loss(two)) <= most


def _over_seeds(row: SetupRow, **values: Sequence[float]) -> SetupRow:
    """The row with the spread of each measure, and of more values; one without values is left out."""
    own = {name: [measure(numbers) for numbers in row.numbers.values()] for name, measure in _MEASURES.items()}
    spreads = {
        name: Spread(statistics.median(of_seeds), min(of_seeds), max(of_seeds))
        for name, of_seeds in {**own, **values}.items()
        if of_seeds
    }
    return replace(row, measured=spreads)


def _relative(row: SetupRow, reference: SetupRow) -> SetupRow:
    """The row with what rests on the reference, from the seeds that both have finished."""
    pairs = [(numbers, reference.numbers[s]) for s, numbers in row.numbers.items() if s in reference.numbers]
    gains = [(other.eval_loss_before - own.eval_loss, other.eval_loss_before - other.eval_loss) for own, other in pairs]
    enough = max(LEAST_GAIN, reference.measured["eval_loss"].range)
    row = _over_seeds(
        row,
        quality=[gain / whole for gain, whole in gains] if all(whole >= enough for _, whole in gains) else [],
        perplexity_ratio=[perplexity(own.eval_loss - other.eval_loss) for own, other in pairs],
    )
    return replace(row, alike=None if row.setup == reference.setup else _within_spread(row, reference))
