"""Pictures as PNG: the loss curve of a run, and the setups of a comparison."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qingtune.files import write_bytes
from qingtune.fonts import font_for


def plot_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw training and evaluation loss over the steps, from a metrics.jsonl; the title may be in any script."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for key, label, marker in (("loss", "training", ""), ("eval_loss", "evaluation", "o")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            few = len(points) < 3
            axes.plot(*zip(*points, strict=True), label=label, marker=marker or ("o" if few else ""), markersize=4)
    lettering = font_for(title)
    axes.set_title(lettering.text, family=lettering.families, fontsize="medium", parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    write_bytes(picture, _as_png(figure))
    plt.close(figure)


def plot_comparison(
    points: Sequence[tuple[str, tuple[float, float, float], tuple[float, float, float]]],
    labels: tuple[str, str],
    picture: Path,
) -> None:
    """Draw setups as points with their spread.

    Args:
        points: name, then median, least and most of what lies across (from 0 on), and of what stands up.
        labels: of the two axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lettering = font_for("\n".join(name for name, _, _ in points))
    names = lettering.text.split("\n")
    with plt.rc_context({"font.family": lettering.families, "axes.unicode_minus": False}):
        figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
        for number, (name, (_, across, up)) in enumerate(zip(names, ((p[0], p[1], p[2]) for p in points), strict=True)):
            axes.errorbar(
                across[0], up[0], xerr=_errors(across), yerr=_errors(up), label=name, markersize=7, capsize=3,
                fmt="osD^v<>pP*X"[number % 11], color=f"C{number % 10}",
            )  # fmt: skip
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.margins(0.12)
        axes.set_xlim(left=0)  # what hardly differs shall look so
        axes.grid(alpha=0.3)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # patterns of modules hold dollar signs
        write_bytes(picture, _as_png(figure, bbox_inches="tight"))
        plt.close(figure)


def _as_png(figure: Any, **settings: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", **settings)
    return content.getvalue()


def _errors(spread: tuple[float, float, float]) -> list[list[float]]:
    median, least, most = spread
    return [[median - least], [most - median]]
