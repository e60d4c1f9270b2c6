"""A comparison as text: Markdown, JSON values, and a table of 80 columns."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from qingtune.evaluation.compare.summary import Comparison, SetupRow, Spread
from qingtune.evaluation.compare.trial import Numbers, State
from qingtune.output.markdown import table
from qingtune.output.units import duration

LONGEST_MESSAGE = 300
_STATES: dict[State, str] = {
    "failed": "failed",
    "pruned": "was stopped early",
    "stopped": "was interrupted",
    "not run": "was not run",
}


def _figures(number: float) -> str:
    """Three or more figures, without an exponent where it can be."""
    return f"{number:.2f}" if number < 1000 else f"{number:.4g}"


# Each measure as text, in the order of the columns. The size of a quality below zero has no meaning.
_SHOWN: dict[str, Callable[[float], str]] = {
    "peak_bytes": lambda count: f"{count / 1e9:.2f} GB",
    "trained_share": lambda share: f"{share * 100:.3g} %",
    "tokens_per_second": "{:,.0f}".format,
    "seconds": duration,
    "eval_loss_before": "{:.4f}".format,
    "eval_loss": "{:.4f}".format,
    "perplexity_before": _figures,
    "perplexity": _figures,
    "quality": lambda share: f"{share * 100:.1f} %" if share >= 0 else "< 0 %",
    "perplexity_ratio": "{:.3f}".format,
}
_ON_SCREEN = {
    "peak_bytes": "peak\nmemory",
    "trained_share": "train-\nable",
    "tokens_per_second": "tokens\n/s",
    "seconds": "time",
    "eval_loss_before": "loss\nbefore",
    "eval_loss": "loss\nafter",
    "perplexity": "perpl.\nafter",
    "quality": "quality\nto {}",
}
_WITH_RANGE = ("eval_loss", "perplexity", "quality")  # on the screen


def as_markdown(comparison: Comparison, about: Sequence[str]) -> str:
    """The page: lines on model, data and settings (`about`), a table of the finished setups, and notes on it."""
    several, name = _several_seeds(comparison), reference_name(comparison)
    heading = (
        "setup", "peak memory", "trainable", "tokens/s", "time", "eval_loss before", "after", "perplexity before",
        "after", f"quality relative to {name}", f"perplexity over that of {name}",
    )  # fmt: skip
    rows: list[list[str]] = []
    for row in comparison.rows:
        if row.measured:
            cells = [_with_range(row, measure, several) for measure in _SHOWN]
            cells[-2] += " ~" * bool(row.alike)
            rows.append([row.setup.name, *cells])
    lines = ["# Comparison", "", *(f"- {line}" for line in about), "", *table(heading, rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(comparison)), ""])


def _with_range(row: SetupRow, measure: str, several: bool) -> str:
    if measure not in row.measured:
        return "-"
    spread, shown = row.measured[measure], _SHOWN[measure]
    least, most = shown(spread.least), shown(spread.most)
    return shown(spread.median) + (f" ({least} - {most})" if several and least != most else "")


def as_console(comparison: Comparison, width: int = 80) -> str:
    """The table for a screen; columns stay, names of setups are wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    grid.add_column("setup", overflow="fold")
    for heading in _ON_SCREEN.values():
        grid.add_column(heading.format(reference_name(comparison)), justify="right", no_wrap=True)
    for row in comparison.rows:
        if row.measured:
            grid.add_row(Text(row.setup.name), *(_on_screen(row, measure) for measure in _ON_SCREEN))
    screen = io.StringIO()
    console = Console(file=screen, width=width, color_system=None, highlight=False)
    console.print(grid)
    for line in notes(comparison):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines())


def _on_screen(row: SetupRow, measure: str) -> str:
    if measure not in row.measured:
        return "-"
    spread, shown = row.measured[measure], _SHOWN[measure]
    mark = " ~" * (measure == "quality" and bool(row.alike))
    half = f"\n±{shown(spread.range / 2)}" if spread.range and measure in _WITH_RANGE else ""
    return shown(spread.median) + mark + half


def notes(comparison: Comparison) -> list[str]:
    """What has to be said of the numbers, a line each."""
    lines: list[str] = []
    if comparison.best:
        lines += [*_about_seeds(comparison), *_about_quality(comparison)]
        if varied := ordered_otherwise(comparison):
            lines.append(
                f"Setups do not train on the same samples in the same steps ({', '.join(varied)}): their losses and "
                "times differ by that, too."
            )
        lines.append(
            "tokens/s: over the logged steps but the first line. time: in steps and evaluations. "
            "memory: the peak of a trial's process."
        )
        lines += _about_best(comparison, comparison.best)
    for row in comparison.rows:
        for seed, outcome in row.outcomes.items():
            if outcome.state != "finished":
                message = f": {outcome.message[:LONGEST_MESSAGE]}" if outcome.message else ""
                lines.append(f"{row.setup.name}, seed {seed}, {_STATES[outcome.state]}{message}")
    return lines


def ordered_otherwise(comparison: Comparison) -> list[str]:
    """Settings by which the setups do not get the same samples in the same steps."""
    configs = [row.setup.config for row in comparison.rows]
    names = ["max_steps"]
    if any(config.max_steps < 0 for config in configs):
        names.append("num_train_epochs")
    if len({config.samples_a_step() for config in configs}) > 1:
        names += ["per_device_train_batch_size", "gradient_accumulation_steps", "samples_per_step"]
    return [name for name in names if len({getattr(config, name) for config in configs}) > 1]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, of every trial; those that are not finite are null."""
    return {
        "reference": comparison.reference and comparison.reference.setup.name,
        "best": comparison.best and comparison.best.setup.name,
        "not told apart from the best": [row.setup.name for row in comparison.alike_best],
        "setups": [_json_of_row(row) for row in comparison.rows],
    }


def _json_of_row(row: SetupRow) -> dict[str, Any]:
    return {
        "name": row.setup.name,
        "method": row.setup.method,
        "varied": row.setup.varied,
        "learning_rate": row.setup.config.learning_rate,
        **{name: _finite(spread) for name, spread in row.measured.items()},
        "not told apart from the reference": row.alike,
        "trials": [
            {"seed": seed, "state": end.state, "message": end.message, **(_finite(end.numbers) if end.numbers else {})}
            for seed, end in row.outcomes.items()
        ],
    }


def _finite(numbers: Spread | Numbers) -> dict[str, float | None]:
    return {name: number if math.isfinite(number) else None for name, number in asdict(numbers).items()}


def _several_seeds(comparison: Comparison) -> bool:
    return any(len(row.numbers) > 1 for row in comparison.rows)


def reference_name(comparison: Comparison) -> str:
    """What quality is relative to, in a word; `notes` names it in full."""
    return "full" if comparison.reference and comparison.reference.setup.method == "full" else "best"


def _about_seeds(comparison: Comparison) -> list[str]:
    seeds = sorted({seed for row in comparison.rows for seed in row.numbers})
    if not _several_seeds(comparison):
        return [f"One seed ({seeds[0]}): small differences may be noise. --seeds 3 shows the spread."]
    lines = [
        f"Medians over {len(seeds)} seeds ({', '.join(map(str, seeds))}); the range over seeds in brackets, or half of "
        "it after ±."
    ]
    fewer = [row.setup.name for row in comparison.rows if 0 < len(row.numbers) < len(seeds)]
    return [*lines, f"Fewer seeds are finished of: {'; '.join(fewer)}."] if fewer else lines


def _about_quality(comparison: Comparison) -> list[str]:
    assert comparison.reference is not None
    name, measured = comparison.reference.setup.name, comparison.reference.measured
    if "quality" not in measured:
        gain = measured["eval_loss_before"].median - measured["eval_loss"].median
        if gain <= 0:
            return [f"no quality is shown: {name} did not lower eval_loss, so there is no reference."]
        return [
            f"no quality is shown: {name}, the reference, lowered eval_loss by {gain:.4f}, which is too little to "
            "compare others with. Train longer, or with a higher learning rate."
        ]
    lines = [
        "quality: (before - after) / (before - after of the reference), in eval_loss, before being the reference's; "
        f"seed by seed. 100 %: as good; < 0 %: worse than before training. The reference is {name}."
    ]
    if any(row.alike for row in comparison.rows):
        lines.append("~: eval_loss differs from the reference's by no more than the larger of their ranges over seeds.")
    return lines


def _about_best(comparison: Comparison, best: SetupRow) -> list[str]:
    def median(row: SetupRow, measure: str) -> str:
        return _SHOWN[measure](row.measured[measure].median)

    lines = [f"Lowest eval_loss: {best.setup.name} ({median(best, 'eval_loss')})."]
    if comparison.alike_best:
        names = [row.setup.name for row in comparison.alike_best]
        leanest = min([best, *comparison.alike_best], key=lambda row: row.measured["peak_bytes"].median)
        lines.append(
            f"Within the spread of it: {'; '.join(names)}. Least memory among them: {leanest.setup.name} "
            f"({median(leanest, 'peak_bytes')})."
        )
    return lines
