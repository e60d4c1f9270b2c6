"""The loss curve of a run as a PNG."""

from __future__ import annotations

import json
from pathlib import Path

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
    figure.savefig(picture)
    plt.close(figure)
