"""Where the lines of a chat come from: a pipe, a plain terminal, or one on which they can be edited."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Literal, Protocol

from qingtune.errors import UserError

TerminalKind = Literal["none", "plain", "full"]
LEAVING = "[Press Ctrl-C again to exit; /exit and Ctrl-D exit, too]"


class Lines(Protocol):
    """Gives the messages that are typed."""

    def read(self, *, recorded: bool) -> str | None:
        """The next message, of one line or several; None at the end. `recorded`: whether it is kept for later chats."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """While the chat lasts: keys that are pressed during an answer do not show between its words."""
        ...


def terminal_kind() -> TerminalKind:
    """What the chat runs on: no terminal to type at, one for plain lines, or one that understands escape sequences."""
    if not sys.stdin.isatty():
        return "none"
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return "plain" if dumb or os.environ.get("NO_COLOR") or not sys.stdout.isatty() else "full"


class PlainLines:
    """A line of stdin is a message; at a terminal, one that ends in a backslash continues on the next line."""

    def __init__(self, note: Callable[[str], None], *, prompted: bool) -> None:
        """`prompted`: there is a terminal, on which each line is asked for."""
        self._note, self._prompted = note, prompted
        if prompted:
            with suppress(ImportError):  # Windows' console edits lines by itself
                import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # arrow keys and history

    def read(self, *, recorded: bool) -> str | None:
        """The next message; None at the end, or when Ctrl-C is pressed twice in a row."""
        lines: list[str] = []
        interrupted = False
        while True:
            try:
                lines.append(self._line("... " if lines else "> "))
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if interrupted:
                    return None
                self._note(f"\n{LEAVING}")
                lines, interrupted = [], True
                continue
            except UnicodeDecodeError:
                self._note("That was not UTF-8 text.")
                continue
            interrupted = False
            if not (self._prompted and lines[-1].endswith("\\")):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def quiet(self) -> AbstractContextManager[None]:
        """Nothing is done: such a terminal is left as it is."""
        return nullcontext()

    def _line(self, prompt: str) -> str:
        if self._prompted and not sys.stdout.isatty():  # stdout is for the answers alone
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return input(prompt if self._prompted and sys.stdout.isatty() else "")
        except OSError as error:  # a folder, open for writing alone, a terminal that went away
            fix = "Pipe text in, or start the chat at a terminal."
            raise UserError(f"cannot be read ({error.strerror})", where="stdin", fix=fix) from None
