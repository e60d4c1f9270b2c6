"""What reaches the screen: progress on stderr, results on stdout, made safe for terminals; no run fails over it.

`say` reports progress and `show` results that are also in files; if their stream fails, the work continues. `give`
writes what a command was asked for, which exists nowhere else, so there a failure ends the command.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from qingtune.errors import UserError, reason_of
from qingtune.output.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console

# A disk may get room again, and a slow reader may read on; other faults of a stream are permanent.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}
# Controls but line feed and tab, and what turns the direction of text or ends a line unseen.
_UNSAFE = [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _UNSAFE}
_MOVES_OF_BARS = re.compile("(\r|\x1b\\[A)")


class OutputClosed(Exception):
    """The reader of stdout went away, as `| head` does, before it had all that was asked for."""


def safe(text: str) -> str:
    """Text that cannot steer a terminal: each character that could is shown as its number, such as \\x1b."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def safe_piece(text: str) -> str:
    """The same of a piece of a text, which may be cut within a line end of two characters."""
    return safe(text.replace("\r", ""))


_label: str | None = ""


@contextmanager
def labelled(label: str | None) -> Generator[None]:
    """Put a label before each line of progress in the block; None: write no progress at all.

    Where several processes train, each computes the same and one reports it.
    """
    global _label
    before, _label = _label, label
    try:
        yield
    finally:
        _label = before


def say(text: str, around: tuple[str, str] = ("", "")) -> None:
    """Report progress, on stderr; `around` are escape sequences of ours."""
    if _label is not None:
        text = safe(redact(f"{_label}: {text}" if _label else text))
        _guarded(sys.stderr, "stderr").put(f"{around[0]}{text}{around[1]}\n")


def show(text: str) -> None:
    """Show people a result that is written to files, on stdout."""
    stdout = _guarded(sys.stdout, "stdout")
    whole = not stdout.lost
    stdout.put(safe(redact(text)) + "\n")
    if whole and isinstance(stdout.fault, UserError):
        say(f"Warning: {stdout.fault}")


def give(text: str, end: str = "\n", around: tuple[str, str] = ("", "")) -> None:
    """Hand out what was asked for, on stdout: as it is to programs, made safe for a terminal.

    Args:
        text: what was asked for.
        end: what ends it.
        around: escape sequences of ours.

    Raises:
        OutputClosed: nobody reads it any more.
        UserError: it cannot be written.
    """
    stdout = _guarded(sys.stdout, "stdout")
    stdout.put(f"{around[0]}{safe_piece(text) if stdout.isatty() else text}{around[1]}{end}")
    if stdout.fault:
        raise stdout.fault


def console() -> Console:
    """Rich's console on stderr. Its own escape sequences pass, so what is printed there has to be `safe`."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Drawn(_guarded(sys.stderr, "stderr"))), highlight=False, soft_wrap=True)


def lost_output() -> list[str]:
    """The streams of which something was lost so far, and why."""
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    return [f"{name}: {stream.lost}" for name, stream in streams.items() if isinstance(stream, Guarded) and stream.lost]


# --- Streams ---------------------------------------------------------------------------------------------------------


class Guarded:
    """A stream of text to which anything may be written: secrets and controls are taken out, and faults are noted.

    Attributes:
        fault: why nothing can be written at present; None if that is not so.
        lost: why something was not written; empty if nothing was lost.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream, self._name = stream, name
        self._may_pass = False
        self.fault: Exception | None = None
        self.lost = ""
        if stream is None:
            self._note(ValueError("it is closed"))

    def write(self, text: str) -> int:
        """Write what a library prints; progress bars of theirs may move the cursor, and nothing else."""
        parts = _MOVES_OF_BARS.split(redact(text))
        self.put("".join(part if place % 2 else safe(part) for place, part in enumerate(parts)))  # odd ones are moves
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def put(self, text: str) -> None:
        """Write a text as it is, with numbers for characters that the encoding lacks; sets `fault`."""
        if self._stream is None or (self.fault and not self._may_pass):
            return
        self.fault = None
        try:
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: it was closed here
            self._note(error)

    def flush(self) -> None:
        """Write out what a library put into the stream's own buffer, as line editors do; ours is never waiting."""
        self.put("")

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        asked = getattr(self._stream, "isatty", None)
        try:
            return bool(asked and asked())
        except ValueError:  # closed
            return False

    @property
    def encoding(self) -> str:
        """Of the text; a notebook's streams have none."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def let_go(self) -> None:
        """Keep Python, which flushes the stream at its end, from failing over what was lost."""
        if self._stream is None or not self.lost:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(AttributeError, OSError, ValueError):  # no file of the system's, so that nobody flushes it
                number, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def _note(self, error: OSError | ValueError) -> None:
        reason = reason_of(error)
        self._may_pass = isinstance(error, OSError) and error.errno in _PASSING
        self.lost = self.lost or reason
        if isinstance(error, BrokenPipeError):
            self.fault = OutputClosed(reason)
        else:
            self.fault = UserError(f"cannot be written ({reason})", where=self._name, fix="Redirect it elsewhere.")

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)


class _Drawn:
    """A guarded stream for a library that draws with escape sequences."""

    def __init__(self, stream: Guarded) -> None:
        self._guarded = stream

    def write(self, text: str) -> int:
        """Write, with the escape sequences."""
        self._guarded.put(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the guarded stream's."""
        return getattr(self._guarded, name)


def _guarded(stream: TextIO | None, name: str) -> Guarded:
    return stream if isinstance(stream, Guarded) else Guarded(stream, name)


@contextmanager
def guarded_output() -> Generator[None]:
    """Guard stdout and stderr within the block, whoever writes to them."""
    before = sys.stdout, sys.stderr
    guards = [_guarded(stream, name) for stream, name in zip(before, ("stdout", "stderr"), strict=True)]
    sys.stdout, sys.stderr = cast("list[Any]", guards)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for guard in guards:
            guard.let_go()


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr on nothing where this process was started without them.

    Otherwise a file opened later, of weights perhaps, would get such a number, and the output would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened == number:
                os.set_inheritable(opened, True)
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
