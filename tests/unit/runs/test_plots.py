"""Text in pictures shows as text: in a font that has it, or as numbers, and never as boxes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from qingtune.runs import plots
from qingtune.runs.plots import lettering, plot_losses

OWN = "DejaVu Sans"  # comes with matplotlib
CHINESE = "我的店 lora"


def write_font(path: Path, family: str, letters: str) -> Path:
    """A font whose letters are squares."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):x}" for letter in dict.fromkeys(letters))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """A machine with matplotlib's fonts alone; those put into the list are installed since it last looked."""
    from matplotlib import font_manager

    paths: list[Path] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))
    before = list(font_manager.fontManager.ttflist)
    comes_with = [font for font in before if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", comes_with)
    yield paths
    font_manager.fontManager._findfont_cached.cache_clear()


def draw(title: str, folder: Path) -> bytes:
    """The picture of a run with this title; any warning is an error."""
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(metrics, folder / "curve.png", title)
    return (folder / "curve.png").read_bytes()


def test_what_the_own_font_has_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_installed_fonts", lambda: pytest.fail("looked for others"))
    assert lettering("eval_loss é → 2.5 %") == ([OWN], "eval_loss é → 2.5 %")


@pytest.mark.usefixtures("installed")
def test_without_a_font_characters_are_written_as_numbers() -> None:
    assert lettering(CHINESE) == ([OWN], r"\u6211\u7684\u5e97 lora")
    assert lettering("🥖 ok") == ([OWN], r"\U0001f956 ok")


def test_fonts_are_added_until_they_have_all_characters(installed: list[Path], tmp_path: Path) -> None:
    fonts = {"Aside": "店", "Noto Sans SC": "我店", "Zuletzt": "我的"}
    installed += [write_font(tmp_path / f"{name}.ttf", name, letters) for name, letters in fonts.items()]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed.append(tmp_path / "broken.ttf")
    assert lettering(CHINESE) == ([OWN, "Noto Sans SC", "Zuletzt"], CHINESE)
    assert lettering("我们") == ([OWN, "Noto Sans SC"], r"我\u4eec")


@pytest.mark.parametrize("title", [CHINESE, "🥖 蓝门 $x_1$", "plain"])
def test_pictures_are_drawn_without_a_missing_glyph(title: str, installed: list[Path], tmp_path: Path) -> None:
    escaped = draw(title, tmp_path)
    assert escaped.startswith(b"\x89PNG")
    installed.append(write_font(tmp_path / "all.ttf", "Alles", title))
    assert (draw(title, tmp_path) != escaped) == (title != "plain")
