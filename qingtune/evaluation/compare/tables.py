"""A comparison as text: Markdown, JSON values, and a table of 80 columns."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from qingtune.evaluation.compare.summary import Comparison, SetupRow, Spread
from qingtune.evaluation.compare.trial import State
from qingtune.output.units import duration

LONGEST_MESSAGE = 300
_STATES: dict[State, str] = {
    "failed": "failed",
    "pruned": "was stopped early",
    "stopped": "was interrupted",
    "not run": "was not run",
}


def as_markdown(comparison: Comparison, about: Sequence[str]) -> str:
    """The page: a table of the finished setups and what has to be said of it.

    Args:
        about: lines on model, data and settings, that come first.
    """
    several = _several_seeds(comparison)
    columns: list[tuple[str, Callable[[SetupRow], Spread | None], Callable[[float], str]]] = [
        ("peak memory", lambda row: row.peak_bytes, gigabytes),
        ("trainable", lambda row: row.trained_share, share),
        ("tokens/s", lambda row: row.tokens_per_second, whole),
        ("time", lambda row: row.seconds, duration),
        ("eval_loss before", lambda row: row.eval_loss_before, loss),
        ("after", lambda row: row.eval_loss, loss),
        ("perplexity before", lambda row: row.perplexity_before, figures),
        ("after", lambda row: row.perplexity, figures),
        (f"quality relative to {reference_name(comparison)}", lambda row: row.quality, percent),
        (f"perplexity over that of {reference_name(comparison)}", lambda row: row.perplexity_ratio, ratio),
    ]
    lines = ["# Comparison", "", *(f"- {line}" for line in about), ""]
    lines += [f"| setup | {' | '.join(name for name, _, _ in columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in comparison.rows:
        if row.eval_loss:
            cells = [_with_range(get(row), shown, several) for _, get, shown in columns]
            cells[-2] += " ~" * bool(row.alike)
            lines.append(f"| {row.setup.name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(comparison)), ""])


def as_console(comparison: Comparison, width: int = 80) -> str:
    """The table for a screen; columns stay, names of setups are wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("setup", overflow="fold")
    for heading in (
        "peak\nmemory",
        "train-\nable",
        "tokens\n/s",
        "time",
        "loss\nbefore",
        "loss\nafter",
        "perpl.\nafter",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"quality\nto {reference_name(comparison)}", justify="right", no_wrap=True)
    for row in comparison.rows:
        if not row.eval_loss:
            continue
        cells = [
            _median(row.peak_bytes, gigabytes),
            _median(row.trained_share, share),
            _median(row.tokens_per_second, whole),
            _median(row.seconds, duration),
            _median(row.eval_loss_before, loss),
            _with_half_range(row.eval_loss, loss),
            _with_half_range(row.perplexity, figures),
            _with_half_range(row.quality, percent, " ~" * bool(row.alike)),
        ]
        table.add_row(Text(row.setup.name), *cells)
    screen = io.StringIO()
    console = Console(file=screen, width=width, color_system=None, highlight=False)
    console.print(table)
    for line in notes(comparison):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines())


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
        lines += _about_best(comparison)
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
    if len({config.per_device_train_batch_size * config.gradient_accumulation_steps for config in configs}) > 1:
        names += ["per_device_train_batch_size", "gradient_accumulation_steps"]
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
    measured = {name: value for name, value in vars(row).items() if isinstance(value, Spread)}
    return {
        "name": row.setup.name,
        "method": row.setup.method,
        "varied": row.setup.varied,
        "learning_rate": row.setup.config.learning_rate,
        **{name: {key: _finite(number) for key, number in asdict(spread).items()} for name, spread in measured.items()},
        "not told apart from the reference": row.alike,
        "trials": [
            {
                "seed": seed,
                "state": outcome.state,
                "message": outcome.message,
                **{
                    name: _finite(number)
                    for name, number in (asdict(outcome.numbers) if outcome.numbers else {}).items()
                },
            }
            for seed, outcome in row.outcomes.items()
        ],
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


# --- Notes -----------------------------------------------------------------------------------------------------------


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
    name, reference = comparison.reference.setup.name, comparison.reference
    if reference.quality is None:
        assert reference.eval_loss_before is not None
        assert reference.eval_loss is not None
        gain = reference.eval_loss_before.median - reference.eval_loss.median
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


def _about_best(comparison: Comparison) -> list[str]:
    best = comparison.best
    if best is None or best.eval_loss is None:
        return []
    lines = [f"Lowest eval_loss: {best.setup.name} ({loss(best.eval_loss.median)})."]
    if comparison.alike_best:
        names = [row.setup.name for row in comparison.alike_best]
        leanest = min([best, *comparison.alike_best], key=_bytes)
        lines.append(
            f"Within the spread of it: {'; '.join(names)}. Least memory among them: {leanest.setup.name} "
            f"({gigabytes(_bytes(leanest))})."
        )
    return lines


def _bytes(row: SetupRow) -> float:
    assert row.peak_bytes is not None
    return row.peak_bytes.median


# --- Cells -----------------------------------------------------------------------------------------------------------


def _median(spread: Spread | None, shown: Callable[[float], str]) -> str:
    return shown(spread.median) if spread else "-"


def _with_range(spread: Spread | None, shown: Callable[[float], str], several: bool) -> str:
    if spread is None:
        return "-"
    least, most = shown(spread.least), shown(spread.most)
    return shown(spread.median) + (f" ({least} - {most})" if several and least != most else "")


def _with_half_range(spread: Spread | None, shown: Callable[[float], str], mark: str = "") -> str:
    if spread is None:
        return "-"
    half = f"\n±{shown(spread.range / 2)}" if spread.range else ""
    return shown(spread.median) + mark + half


def gigabytes(number: float) -> str:
    """Bytes in GB."""
    return f"{number / 1e9:.2f} GB"


def share(number: float) -> str:
    """A share in percent, three figures."""
    return f"{number * 100:.3g} %"


def percent(number: float) -> str:
    """A share in percent, to one place; how far below nothing it is tells nothing."""
    return f"{number * 100:.1f} %" if number >= 0 else "< 0 %"


def loss(number: float) -> str:
    """A loss in nats."""
    return f"{number:.4f}"


def figures(number: float) -> str:
    """Three or more figures, without an exponent where it can be."""
    return f"{number:.2f}" if number < 1000 else f"{number:.4g}"


def ratio(number: float) -> str:
    """A ratio near 1."""
    return f"{number:.3f}"


def whole(number: float) -> str:
    """A whole number."""
    return f"{number:,.0f}"
