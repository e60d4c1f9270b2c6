"""Text in pictures: a font that has its characters, or the text without what no font has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

# Looked at first, as they are made for reading; whether one has the characters, its own table tells.
_KNOWN = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans CJK JP", "Droid Sans Fallback",
    "Heiti SC", "SimHei", "Arial Unicode MS",
)  # fmt: skip


@dataclass(frozen=True)
class Lettering:
    """How to write a text with matplotlib: the font families to ask in turn, and the text they can write."""

    families: list[str]
    text: str


def font_for(text: str) -> Lettering:
    """Find an installed font for what matplotlib's own font lacks.

    One font is added at most: the first that has all of the missing characters, else the one that has most of them.
    What is missing even there is written as its number, such as \\u5e97, so that nothing is drawn as an empty box.
    """
    own = _default_family()
    missing = {ord(letter) for letter in text if not letter.isspace()} - _characters(_path_of(own))
    families, found = [own], frozenset[int]()
    if missing:
        family, found = _best_font(frozenset(missing))
        families += [family] if found else []
    unknown = missing - found
    escaped = (letter.encode("unicode_escape").decode() if ord(letter) in unknown else letter for letter in text)
    return Lettering(families, "".join(escaped))


@cache
def _best_font(missing: frozenset[int]) -> tuple[str, frozenset[int]]:
    """The family that has most of the characters, and those it has."""
    best, found = "", frozenset[int]()
    for family, path in _fonts():
        has = missing & _characters(path)
        if len(has) > len(found):
            best, found = family, has
        if len(found) == len(missing):
            break
    return best, found


def _fonts() -> Iterator[tuple[str, str]]:
    """Family and file of upright fonts of ordinary weight: the known ones, the others, those installed of late.

    matplotlib keeps a list of fonts and does not look again by itself.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    listed = list(fontManager.ttflist)
    yield from _plain(listed)
    files = {font.fname for font in listed}
    for path in sorted(set(findSystemFonts()) - files):
        with suppress(OSError, RuntimeError):  # of a kind that it cannot read
            fontManager.addfont(path)
    yield from _plain([font for font in fontManager.ttflist if font.fname not in files])


def _plain(fonts: Sequence[FontEntry]) -> list[tuple[str, str]]:
    place = {name: number for number, name in enumerate(_KNOWN)}
    plain = [font for font in fonts if font.style == "normal" and font.weight in (400, "normal", "regular", "book")]
    plain.sort(key=lambda font: (place.get(font.name, len(place)), font.name))
    return [(font.name, font.fname) for font in plain]


def _default_family() -> str:
    import matplotlib

    return str(matplotlib.rcParams["font.sans-serif"][0])


def _path_of(family: str) -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(family))


@cache
def _characters(path: str) -> frozenset[int]:
    """The characters of a font's own table; none for one that cannot be drawn at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # gone since matplotlib listed it, or of a kind it cannot read
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
