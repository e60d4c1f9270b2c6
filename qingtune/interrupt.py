"""Ctrl-C while an answer is made: it breaks off the model's work, once, and nothing else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType, TracebackType


class Interruptible:
    """Has Ctrl-C break off the wait for a model's next piece of text, and nothing that is done with one.

    Pressed at another time it counts as well: no further piece is waited for. More presses change nothing.

    Attributes:
        pressed: whether it was pressed.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._waiting = False

    def __enter__(self) -> Interruptible:
        """Take over Ctrl-C."""
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give it back."""
        signal.signal(signal.SIGINT, self._before)

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
