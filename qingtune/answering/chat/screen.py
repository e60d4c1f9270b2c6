"""Where a chat shows: answers on stdout, notices on stderr, thinking folded into a line that counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.answering.thinking import CLOSING, OPENING, Part, ThinkingSplitter
from qingtune.output.console import give, safe, safe_piece, say

_DIM, _PLAIN, _LINE_ANEW = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


@dataclass(frozen=True)
class Screen:
    """The two streams; `live`: stdout is a terminal that understands escape sequences."""

    live: bool

    def note(self, text: str) -> None:
        """Show a notice."""
        say(text, around=(_DIM, _PLAIN) if self.live and sys.stderr.isatty() else ("", ""))

    def write(self, text: str, *, dim: bool = False) -> None:
        """Show a piece of an answer."""
        give(safe_piece(text) if self.live else text, end="", around=(_DIM, _PLAIN) if dim and self.live else ("", ""))

    def write_line_anew(self, text: str) -> None:
        """Put a dim text in place of the line on which the cursor is; nothing where lines stay as they are."""
        if self.live:
            give(safe(text), end="", around=(f"{_LINE_ANEW}{_DIM}", _PLAIN))


class AnswerView:
    """An answer on the screen, from its first piece to its last.

    Args:
        show_thinking: dim on a terminal, between its tags elsewhere; if not, it is counted on a terminal.
        opened: whether the prompt ended with the tag that opens the thinking.
    """

    def __init__(self, screen: Screen, *, show_thinking: bool, opened: bool) -> None:
        self._screen, self._show_thinking = screen, show_thinking
        self._splitter = ThinkingSplitter(opened=opened)
        self._thinking = ""  # so far, without the blanks before it
        self._answering = False

    def show(self, piece: str) -> None:
        """Show the next piece of text."""
        self._show_parts(self._splitter.feed(piece))

    def close(self) -> None:
        """Show what was held back, and end the line."""
        self._show_parts(self._splitter.end())
        if self._answering:
            self._screen.write("\n")
        else:
            self._end_thinking()

    def _show_parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.thinking:
                self._think(part.text if self._thinking else part.text.lstrip())
                continue
            if not self._answering:
                self._end_thinking()
            self._answering = True
            self._screen.write(part.text)

    def _think(self, text: str) -> None:
        if self._show_thinking and text:
            opening = OPENING if not self._thinking and not self._screen.live else ""
            self._screen.write(opening + text, dim=True)
        self._thinking += text
        if self._thinking and not self._show_thinking:
            self._screen.write_line_anew(f"thinking… {len(self._thinking.rstrip()):,} characters")

    def _end_thinking(self) -> None:
        if self._thinking and self._show_thinking:
            self._screen.write("\n\n" if self._screen.live else f"{CLOSING}\n\n")
        elif self._thinking and self._screen.live:
            self._screen.write("\n")
