"""Measured trials -> a comparison: spread over seeds, quality relative to a reference, setups that do not differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qingtune.evaluation.compare.setups import Setup
from qingtune.evaluation.compare.trial import Numbers, TrialOutcome
from qingtune.runs.losses import perplexity

# In nats: a quality is a share of what the reference learnt, and 16-bit losses of the same weights differ by 0.002.
LEAST_GAIN = 0.05


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
    """A setup's trials together; measurements are None where no trial is finished.

    Attributes:
        outcomes: seed -> how its trial ended.
        trained_share: of the parameters.
        quality: how much of the reference's way from the base model's loss it came, as a share; seed by seed
            (before - after) / (before - reference's after), `before` being the reference's. None where the reference
            learnt too little for that (LEAST_GAIN, and its range over seeds).
        perplexity_ratio: its perplexity over the reference's, seed by seed.
        alike: whether its eval_loss differs from the reference's by no more than the larger of their ranges over seeds;
            None with fewer than two seeds, or for the reference itself.
    """

    setup: Setup
    outcomes: Mapping[int, TrialOutcome]
    peak_bytes: Spread | None = None
    trained_share: Spread | None = None
    tokens_per_second: Spread | None = None
    seconds: Spread | None = None
    eval_loss_before: Spread | None = None
    eval_loss: Spread | None = None
    perplexity_before: Spread | None = None
    perplexity: Spread | None = None
    quality: Spread | None = None
    perplexity_ratio: Spread | None = None
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
    rows = [_measured(setup, of_seeds) for setup, of_seeds in outcomes]
    finished = [row for row in rows if row.eval_loss]
    best = min(finished, key=_median_loss, default=None)
    full = [row for row in finished if row.setup.method == "full"]
    reference = min(full, key=_median_loss) if full else best
    if reference is None or best is None:
        return Comparison(rows, None, None, [])
    related = [_relative(row, reference) if row.eval_loss else row for row in rows]
    here = {row.setup.name: row for row in related}
    alike = [row for row in related if row.eval_loss and row.setup != best.setup and within_spread(row, best)]
    return Comparison(related, here[reference.setup.name], here[best.setup.name], alike)


def within_spread(one: SetupRow, two: SetupRow) -> bool | None:
    """Whether medians of eval_loss differ by no more than the larger range over seeds; None where none is known."""
    assert one.eval_loss is not None
    assert two.eval_loss is not None
    if min(len(one.numbers), len(two.numbers)) < 2:
        return None
    return abs(one.eval_loss.median - two.eval_loss.median) <= max(one.eval_loss.range, two.eval_loss.range)


def _median_loss(row: SetupRow) -> float:
    assert row.eval_loss is not None
    return row.eval_loss.median


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def _measured(setup: Setup, outcomes: Mapping[int, TrialOutcome]) -> SetupRow:
    row = SetupRow(setup, outcomes)

    def over_seeds(measure: Callable[[Numbers], float]) -> Spread | None:
        return _spread([measure(numbers) for numbers in row.numbers.values()])

    return replace(
        row,
        peak_bytes=over_seeds(lambda n: n.peak_bytes),
        trained_share=over_seeds(lambda n: n.trained_parameters / n.parameters),
        tokens_per_second=over_seeds(lambda n: n.tokens_per_second),
        seconds=over_seeds(lambda n: n.seconds),
        eval_loss_before=over_seeds(lambda n: n.eval_loss_before),
        eval_loss=over_seeds(lambda n: n.eval_loss),
        perplexity_before=over_seeds(lambda n: perplexity(n.eval_loss_before)),
        perplexity=over_seeds(lambda n: perplexity(n.eval_loss)),
    )


def _relative(row: SetupRow, reference: SetupRow) -> SetupRow:
    """The row with what rests on the reference, from the seeds that both have finished."""
    pairs = [(numbers, reference.numbers[s]) for s, numbers in row.numbers.items() if s in reference.numbers]
    gains = [(other.eval_loss_before - own.eval_loss, other.eval_loss_before - other.eval_loss) for own, other in pairs]
    assert reference.eval_loss is not None
    enough = max(LEAST_GAIN, reference.eval_loss.range)
    quality = [gain / whole for gain, whole in gains] if all(whole >= enough for _, whole in gains) else []
    return replace(
        row,
        quality=_spread(quality),
        perplexity_ratio=_spread([perplexity(own.eval_loss - other.eval_loss) for own, other in pairs]),
        alike=None if row.setup == reference.setup else within_spread(row, reference),
    )
