"""Signals: those that end a command, those deferred until work is saved, and Ctrl-C during an answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
# A kill, a terminal that is gone, and SLURM's warning that a job's time is nearly over; Windows has only the first.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
# A second one of these is deliberate; a terminal that goes away may send its signal several times.
_DELIBERATE = {signal.SIGINT, signal.SIGTERM}


class Terminated(SystemExit):
    """A signal that ends the command; unwinding removes unfinished files. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def handled(numbers: Sequence[int], handler: Handler) -> Generator[None]:
    """Call a function for signals within the block; outside of the main thread this does nothing."""
    before: dict[int, object] = {}
    with suppress(ValueError):  # not the main thread
        for number in numbers:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():  # None: not set from Python
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)  # pyright: ignore[reportArgumentType]


@contextmanager
def unwinding() -> Generator[None]:
    """Let the signals of ENDING unwind the process as Ctrl-C does; those that are ignored or handled are left alone.

    One that follows during the unwinding changes nothing. Where one came, any other error counts as it: code in C that
    the signal found at work may turn the exception into another.
    """
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise Terminated(number)

    with handled([number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL], end):
        try:
            yield
        except Exception as error:
            if came:
                raise Terminated(came[0]) from error
            raise


@contextmanager
def put_off(message: str) -> Generator[list[int]]:
    """Note Ctrl-C and the signals of ENDING in a list instead of ending; a second Ctrl-C or SIGTERM interrupts.

    SIGHUP stays ignored where it is, as under nohup.

    Args:
        message: shown when the first one comes.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number in _DELIBERATE and not _DELIBERATE.isdisjoint(received):
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            tell_at_once(message)

    with handled([signal.SIGINT, *heeded()], note):
        yield received


def heeded() -> list[int]:
    """The signals of ENDING that are not ignored."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def tell_at_once(message: str) -> None:
    """Show a line from within a signal handler, past all streams, which may be in use."""
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


class Interruptible:
    """Has Ctrl-C stop the wait for a model's next piece of text, but not the work on one.

    Pressed at another time it counts as well: no further piece is waited for. More presses change nothing.

    Attributes:
        pressed: whether it was pressed.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._waiting = False

    def handling(self) -> AbstractContextManager[None]:
        """Take over Ctrl-C meanwhile."""
        return handled([signal.SIGINT], self._press)

    def pieces(self, source: Iterator[str]) -> Iterator[str]:
        """The pieces of an answer until it ends or Ctrl-C is pressed."""
        while not self.pressed:
            try:
                try:
                    self._waiting = True
                    piece = next(source, None)
                finally:
                    self._waiting = False
            except KeyboardInterrupt:
                return
            if piece is None:
                return
            yield piece

    def _press(self, number: int, frame: FrameType | None) -> None:
        first, self.pressed = not self.pressed, True
        if self._waiting and first:
            raise KeyboardInterrupt
