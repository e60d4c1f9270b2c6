"""What an evaluation found, as a table on the screen, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qingtune.evaluation.intervals import RESAMPLES, SHARE, Change, ValueWithInterval, compare
from qingtune.evaluation.metrics import Metric, Outcome, metrics_of, signatures
from qingtune.files.write import write_json, write_text
from qingtune.output.console import show
from qingtune.output.markdown import table
from qingtune.output.redaction import redact, redact_values
from qingtune.output.units import counted
from qingtune.runs.record import versions

RESULT, MARKDOWN = "evaluation.json", "evaluation.md"
NAME_WIDTH, VALUE_WIDTH = 24, 9
SHOWN_TOO_LONG = 5
TOO_LARGE = 1e5  # to be written out
PER_TOKEN = ("loss", "perplexity")
AFTER = "after"


@dataclass(frozen=True)
class About:
    """What was evaluated: files with their SHA-256, the rows read, those with a reference, the command's settings."""

    data: dict[str, str]
    rows: int
    references: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One model's part.

    Attributes:
        model: where it lies.
        identity: what decides its answers.
        outcomes: of each row.
        without_loss: rows that have an answer to learn and are too long for a loss.
        harness: metrics of lm-evaluation-harness by task; None if it was not asked.
    """

    model: str
    identity: dict[str, Any]
    outcomes: list[Outcome]
    without_loss: list[str]
    harness: dict[str, Any] | None


def changes_of(sides: Mapping[str, Side]) -> list[Change]:
    """Every metric, before and after; losses of different tokenizers are shown without their difference."""
    before = {metric.name: metric for metric in metrics_of(sides["before"].outcomes)} if "before" in sides else {}
    return [_change(before.get(metric.name), metric) for metric in metrics_of(sides[AFTER].outcomes)]


def _change(before: Metric | None, after: Metric) -> Change:
    if before is not None and after.name in PER_TOKEN and not np.array_equal(before.rows[:, 1], after.rows[:, 1]):
        return replace(compare(None, after), before=compare(None, before).after)
    return compare(before, after)


def write_report(output_dir: Path, about: About, sides: Mapping[str, Side]) -> list[Change]:
    """Write both files, evaluation.json last; its presence says that the evaluation is whole."""
    changes = changes_of(sides)
    write_text(output_dir / MARKDOWN, redact(as_markdown(about, changes, sides)))
    write_json(output_dir / RESULT, redact_values(as_json(about, changes, sides)))
    return changes


def as_json(about: About, changes: Sequence[Change], sides: Mapping[str, Side]) -> dict[str, Any]:
    """Everything, for programs; null where there is no value."""
    return {
        "data": about.data,
        "rows": about.rows,
        "rows_with_reference": about.references,
        "models": {name: {"model": side.model, **side.identity} for name, side in sides.items()},
        "rows_without_loss": {name: side.without_loss for name, side in sides.items()},
        "intervals": {"share": SHARE, "resamples": RESAMPLES, "kind": "paired percentile bootstrap over rows"},
        "sacrebleu": _signatures(sides[AFTER]),
        "metrics": {change.name: _change_as_json(change) for change in changes},
        "lm_eval": {name: side.harness for name, side in sides.items() if side.harness is not None},
        "settings": about.settings,
        "versions": versions(),
    }


def _signatures(side: Side) -> dict[str, str]:
    """How sacrebleu computed; nothing where it had nothing to compare."""
    compared = [one.reference for one in side.outcomes if one.answer is not None and one.reference is not None]
    return signatures(compared) if compared else {}


def _change_as_json(change: Change) -> dict[str, Any]:
    estimates = {"before": change.before, "after": change.after, "difference": change.difference}
    return {
        **{name: estimate and _estimate_as_json(estimate) for name, estimate in estimates.items()},
        "difference_excludes_zero": change.sure,
        "rows": change.rows,
    }


def _estimate_as_json(estimate: ValueWithInterval) -> dict[str, Any]:
    value = estimate.value if math.isfinite(estimate.value) else None
    return {"value": value, "interval": estimate.interval and list(estimate.interval)}


# --- For people ------------------------------------------------------------------------------------------------------


def print_report(about: About, changes: Sequence[Change], sides: Mapping[str, Side]) -> None:
    """Print the table, within 80 columns, and what it rests on."""
    for line in [*as_table(changes, compared="before" in sides), *_harness_lines(sides), *notes(about, changes, sides)]:
        show(line)


def as_table(changes: Sequence[Change], *, compared: bool) -> list[str]:
    """One line a metric: before, after and the difference with its interval; or the value with its interval."""
    share = f"[{SHARE:.0%}]"
    heading = ("before", "after", f"difference {share}") if compared else ("value", share)
    lines = [_line("metric", heading)] if changes else []
    for change in changes:
        after, digits = _number(change.after.value, change.digits), change.digits
        if compared:
            before = "-" if change.before is None else _number(change.before.value, digits)
            lines.append(_line(change.name, (before, after, _difference(change))))
        else:
            lines.append(_line(change.name, (after, _interval(change.after, digits))))
    return lines


def _line(name: str, cells: Sequence[str]) -> str:
    *numbers, last = cells
    return f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:>{VALUE_WIDTH}}" for cell in numbers) + f"  {last}"


def as_markdown(about: About, changes: Sequence[Change], sides: Mapping[str, Side]) -> str:
    """The same as a page, with the intervals of both models."""
    compared = "before" in sides
    names = ("before", "after", "difference") if compared else ("after",)
    rows: list[list[str]] = []
    for change in changes:
        after = _with_interval(change.after, change.digits)
        cells = [_with_interval(change.before, change.digits), after, _difference(change)] if compared else [after]
        rows.append([change.name, *(cell.replace("*", "\\*") for cell in cells)])
    lines = ["# Evaluation", "", *table(["metric", *(f"{name} [{SHARE:.0%}]" for name in names)], rows)]
    if harness := _harness_lines(sides):
        lines += ["", "```", *harness, "```"]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(about, changes, sides))]) + "\n"


def notes(about: About, changes: Sequence[Change], sides: Mapping[str, Side]) -> list[str]:
    """What the numbers rest on."""
    after = sides[AFTER]
    found = [f"{name}: {side.model}" for name, side in sides.items()]
    if changes:
        answered = sum(one.answer is not None for one in after.outcomes)
        ruled = sum(bool(one.form) for one in after.outcomes)
        how = f"{answered:,} answered greedily" if answered else "none answered"
        found.append(
            f"{counted(about.rows, 'row')}: {about.references:,} with a reference, {how}, {ruled:,} with rules of form."
        )
        found.append(f"{SHARE:.0%} intervals: paired bootstrap over rows, {RESAMPLES:,} times.")
    if any(change.sure for change in changes):
        found.append("*: the difference's interval excludes zero.")
    found += [f"{name}: {signature}" for name, signature in _signatures(after).items()]
    for name, side in sides.items():
        if side.without_loss:
            shown = ", ".join(side.without_loss[:SHOWN_TOO_LONG]) + " ..." * (len(side.without_loss) > SHOWN_TOO_LONG)
            rows = counted(len(side.without_loss), "row")
            found.append(f"{name}: {rows} too long for a loss (max_seq_length): {shown}")
    if any(c.name in PER_TOKEN and c.before is not None and c.difference is None for c in changes):
        found.append("Losses are per token, and the models' tokenizers differ: the losses cannot be compared.")
    return found


def _harness_lines(sides: Mapping[str, Side]) -> list[str]:
    """Tasks of lm-evaluation-harness: each metric with the standard error that the harness gives."""
    shown = {name: side.harness for name, side in sides.items() if side.harness}
    if not shown:
        return []
    lines = [_line("lm_eval", [*shown, "standard errors"])]
    for task, metrics in shown[AFTER].items():
        for metric in metrics:
            both = [results[task][metric] for results in shown.values()]
            errors = ", ".join("-" if one["error"] is None else f"{one['error']:.4f}" for one in both)
            lines.append(_line(f"{task} {metric}", [*(_number(one["value"], 4) for one in both), errors]))
    return lines


def _number(value: float, digits: int, sign: str = "") -> str:
    """A value in a column's width: the perplexity of a broken model would fill the screen with digits."""
    if not math.isfinite(value):
        return "-"
    return f"{value:{sign}.3g}" if abs(value) >= TOO_LARGE else f"{value:{sign}.{digits}f}"


def _interval(estimate: ValueWithInterval, digits: int, sign: str = "") -> str:
    if estimate.interval is None:
        return "-"
    low, high = (_number(end, digits, sign) for end in estimate.interval)
    return f"[{low}, {high}]"


def _with_interval(estimate: ValueWithInterval | None, digits: int, sign: str = "") -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    interval = "" if estimate.interval is None else f" {_interval(estimate, digits, sign)}"
    return f"{_number(estimate.value, digits, sign)}{interval}"


def _difference(change: Change) -> str:
    """With its sign, and a star where it is sure."""
    return _with_interval(change.difference, change.digits, "+") + " *" * bool(change.sure)
