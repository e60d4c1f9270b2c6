"""Text of strangers in Markdown: it stays text, whatever markup, links, tables or HTML it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LINE_ENDS = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_PLAIN = re.compile(r"[^\W_](?:[\w.+,/ -]*[^\W_])?")
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$#]")
_BEGINS_LINK = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)


def value(text: str) -> str:
    """A name or number: as it is where it is a plain word or several, as code otherwise."""
    plain = _PLAIN.fullmatch(text) and "www." not in text.lower() and "//" not in text and "__" not in text
    return text if plain else code(text)


def code(text: str) -> str:
    """Text as code; one that holds backticks gets longer ones around it."""
    text = _LINE_ENDS.sub("<br>", text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " * ("`" in text or not text.strip())
    return f"{fence}{space}{text}{space}{fence}"


def prose(text: str) -> str:
    """Words as they are, on one line."""
    return _BEGINS_LINK.sub("\\\\", _MARKUP.sub(r"\\\g<0>", _LINE_ENDS.sub(" ", text)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """A cell that ends where it should; backslashes before a line that ends cells would undo its own."""
    return re.sub(r"\\*\|", r"\\|", _LINE_ENDS.sub("<br>", text))
