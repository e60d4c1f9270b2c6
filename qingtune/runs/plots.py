"""Pictures as PNG: the loss curve of a run, and the setups of a comparison.

They are drawn into memory by Agg itself. pyplot, and with it MPLBACKEND, which names a notebook's or a missing
library, is not asked.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.files.write import write_bytes
from qingtune.output.console import say
from qingtune.runs.page.source import read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

# Chinese fonts made for reading, which are preferred to any other that has the characters.
_PREFERRED = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
)  # fmt: skip


def try_to_draw(draw: Callable[[], None], name: str) -> bool:
    """Draw, and return whether it worked; an error is reported and does not stop the run."""
    try:
        draw()
    except Exception as error:
        say(f"Warning: {name} was not drawn: {type(error).__name__}: {error}")
        return False
    return True


def plot_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw training and evaluation loss over the steps, from a metrics.jsonl; the title may be in any script."""
    figure, axes = _figure(7, 4)
    curves = read_curves(metrics)
    training = (curves.steps, curves.values["loss"], "training", "")
    for steps, losses, label, marker in (training, (curves.eval_steps, curves.eval_losses, "evaluation", "o")):
        points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
        if points:
            few = len(points) < 3
            axes.plot(*zip(*points, strict=True), label=label, marker=marker or ("o" if few else ""), markersize=4)
    families, title = lettering(title)
    axes.set_title(title, family=families, fontsize="medium", parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    _save(figure, picture)


def plot_comparison(
    points: Sequence[tuple[str, tuple[float, float, float], tuple[float, float, float]]],
    labels: tuple[str, str],
    picture: Path,
) -> None:
    """Draw setups as points with their spread.

    Args:
        points: name, then median, least and most of the horizontal axis (from 0 on), and of the vertical one.
        labels: of the two axes.
        picture: the file to write.
    """
    matplotlib = _matplotlib()
    families, names = lettering("\n".join(name for name, _, _ in points))
    with matplotlib.rc_context({"font.family": families, "axes.unicode_minus": False}):
        figure, axes = _figure(8, 4.5)
        for number, (name, (_, across, up)) in enumerate(zip(names.split("\n"), points, strict=True)):
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
        _save(figure, picture, bbox_inches="tight")


def lettering(text: str) -> tuple[list[str], str]:
    """The font families with which matplotlib can write a text: its own, then installed ones that have what is missing.

    Returns:
        The families, and the text; a character that no font has is written as its number, such as \\u5e97, where
        matplotlib would draw an empty box.
    """
    matplotlib = _matplotlib()
    from matplotlib.font_manager import findfont

    families = [str(matplotlib.rcParams["font.sans-serif"][0])]
    missing = {ord(letter) for letter in text if not letter.isspace()} - _characters(findfont(families[0]))
    for font in _installed_fonts() if missing else ():
        if found := missing & _characters(font.fname):
            families.append(font.name)
            missing -= found
        if not missing:
            break
    letters = (letter.encode("unicode_escape").decode() if ord(letter) in missing else letter for letter in text)
    return families, "".join(letters)


def _installed_fonts() -> list[FontEntry]:
    """Upright fonts of ordinary weight, those installed since matplotlib last looked among them."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted(set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}):
        with suppress(OSError, RuntimeError):  # a format that it does not read
            fontManager.addfont(path)
    upright = [font for font in fontManager.ttflist if font.style == "normal"]
    plain = [font for font in upright if font.weight in (400, "normal", "regular", "book")]
    return sorted(plain, key=lambda font: (font.name not in _PREFERRED, font.name))


def _characters(path: str) -> set[int]:
    """The code points for which a font has a glyph that scales."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or a format that it does not read
        return set()
    return set(font.get_charmap()) if font.scalable else set()


def _errors(spread: tuple[float, float, float]) -> list[list[float]]:
    median, least, most = spread
    return [[median - least], [most - median]]


def _matplotlib() -> Any:
    """The library; it refuses to be imported while MPLBACKEND names nothing that it knows."""
    before = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if before is not None:
            os.environ["MPLBACKEND"] = before
    return matplotlib


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture of this size in inches."""
    _matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    return figure, figure.add_subplot()


def _save(figure: Figure, picture: Path, **options: Any) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_bytes(picture, drawn.getvalue())
