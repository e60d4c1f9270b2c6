"""Separates a model's thinking from its answer during generation: `<think>...</think>` at the start, as in Qwen3.

Only a block with which a text begins is thinking. Tags further on belong to the answer, which may speak of them; a text
that begins with words has no thinking. A block that never closes is thinking to the end, and leaves no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class Part:
    """A piece of text, of the thinking or of the answer."""

    text: str
    thinking: bool


class ThinkingSplitter:
    """Takes text in pieces, cut anywhere, and gives it back in parts as soon as it is clear what they are.

    The tags, the space before the block and the line ends after it belong to neither part.
    """

    def __init__(self, *, opened: bool = False) -> None:
        """Begin a text; `opened`: the prompt ended with the opening tag, so that thinking comes first."""
        self._place: Literal["start", "thinking", "after", "answer"] = "thinking" if opened else "start"
        self._held = ""

    def feed(self, piece: str) -> list[Part]:
        """What the next piece makes clear; text that may be part of a tag is held back."""
        self._held += piece
        parts: list[Part] = []
        if self._place == "start":
            self._look_for_a_block()
        if self._place == "thinking":
            before, closing, rest = self._held.partition(CLOSING)
            kept = 0 if closing else _start_of(CLOSING, before)
            parts.append(Part(before[: len(before) - kept], thinking=True))
            self._held = rest if closing else before[len(before) - kept :]
            self._place = "after" if closing else "thinking"
        if self._place == "after":
            self._held = self._held.lstrip("\n")
            self._place = "answer" if self._held else "after"
        if self._place == "answer":
            parts.append(Part(self._held, thinking=False))
            self._held = ""
        return [part for part in parts if part.text]

    def end(self) -> list[Part]:
        """What was held back, once no more can come."""
        held, self._held = self._held, ""
        return [Part(held, self._place == "thinking")] if held else []

    def _look_for_a_block(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPENING):
            self._place, self._held = "thinking", text[len(OPENING) :]
        elif not OPENING.startswith(text):
            self._place = "answer"


def _start_of(tag: str, text: str) -> int:
    """How many characters at the end of a text may be the start of a tag."""
    return next((count for count in range(len(tag) - 1, 0, -1) if text.endswith(tag[:count])), 0)


def split_thinking(text: str) -> tuple[str, str]:
    """The thinking and the answer of a whole text."""
    splitter = ThinkingSplitter()
    parts = splitter.feed(text) + splitter.end()
    thinking, answer = ("".join(part.text for part in parts if part.thinking is kind) for kind in (True, False))
    return thinking, answer
