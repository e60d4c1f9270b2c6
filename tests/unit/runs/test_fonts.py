"""Text in pictures shows as text: in a font that has it, or as numbers, and never as boxes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from qingtune.runs import fonts
from qingtune.runs.fonts import font_for
from qingtune.runs.plots import plot_losses

OWN = "DejaVu Sans"  # comes with matplotlib
CHINESE = "我的店 lora"


@pytest.fixture
def none_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fonts._best_font.cache_clear()
    monkeypatch.setattr(fonts, "_fonts", lambda: [(OWN, fonts._path_of(OWN))])
    yield
    fonts._best_font.cache_clear()


def test_what_the_own_font_has_needs_no_other() -> None:
    assert font_for("eval_loss é → 2.5 %") == fonts.Lettering([OWN], "eval_loss é → 2.5 %")


@pytest.mark.usefixtures("none_installed")
def test_without_a_font_characters_are_written_as_numbers() -> None:
    assert font_for(CHINESE) == fonts.Lettering([OWN], r"\u6211\u7684\u5e97 lora")
    assert font_for("🥖 ok") == fonts.Lettering([OWN], r"\U0001f956 ok")


def test_the_font_with_most_of_the_characters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"own": "lora ", "few": "店", "most": "我店", "none": ""}
    monkeypatch.setattr(fonts, "_default_family", lambda: "own")
    monkeypatch.setattr(fonts, "_path_of", lambda family: family)
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(map(ord, tables[path])))
    monkeypatch.setattr(fonts, "_fonts", lambda: [(name, name) for name in ("none", "few", "most")])
    fonts._best_font.cache_clear()
    assert font_for(CHINESE) == fonts.Lettering(["own", "most"], r"我\u7684店 lora")
    fonts._best_font.cache_clear()


def test_an_installed_font_writes_chinese() -> None:
    lettering = font_for(CHINESE)
    if lettering.families == [OWN]:
        pytest.skip("no font with Chinese characters is installed")
    assert lettering.text == CHINESE


@pytest.mark.parametrize("title", [CHINESE, "🥖 蓝门 $x_1$", "plain"])
def test_pictures_are_drawn_without_a_missing_glyph(title: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(metrics, tmp_path / "curve.png", title)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
