"""What happens in a run, as frozen records, and where these go: console, metrics.jsonl, trackers.

A sink is a function of an event. It cannot change the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qingtune.errors import UserError
from qingtune.files.json_files import open_plain, parse_object, whole
from qingtune.files.write import open_in_place, refuse_links, write_bytes
from qingtune.output.console import console, safe, say


@dataclass(frozen=True)
class Stepped:
    """An optimizer step, or several taken together for a logged line.

    Attributes:
        step: the last step, counted from 1.
        epoch: passes over the data so far.
        loss: mean over the trained tokens, in nats.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        tokens: all tokens read, over all processes.
        trained_tokens: those that count in the loss.
        seconds: time taken.
        peak_bytes: the most memory held so far.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after a step; eval_loss is the mean over the trained tokens of the evaluation data."""

    step: int
    epoch: float
    eval_loss: float
    eval_tokens: int
    eval_seconds: float


@dataclass(frozen=True)
class Noted:
    """Something to tell the user."""

    text: str


Event = Stepped | Evaluated | Noted
Sink = Callable[[Event], None]


def to_all(sinks: Sequence[Sink]) -> Sink:
    """A sink that passes events on to several."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


class EverySteps:
    """Passes steps on in groups: one record for each `count` steps, aligned to multiples of `count`."""

    def __init__(self, count: int, last_step: int, sink: Sink, group: list[Stepped]) -> None:
        """Begin with the steps that an earlier start of the run left in `group`, which always holds those to come."""
        self.count, self.last_step, self.sink, self.group = count, last_step, sink, group

    def __call__(self, event: Event) -> None:
        """Take an event; events other than steps are passed on at once."""
        if not isinstance(event, Stepped):
            self.sink(event)
            return
        self.group.append(event)
        if event.step % self.count == 0 or event.step == self.last_step:
            self.sink(together(self.group))
            self.group.clear()


def together(steps: Sequence[Stepped]) -> Stepped:
    """Steps as one record; the loss is weighted by trained tokens."""
    trained = sum(step.trained_tokens for step in steps)
    return dataclasses.replace(
        steps[-1],
        loss=sum(step.loss * step.trained_tokens for step in steps) / trained,
        tokens=sum(step.tokens for step in steps),
        trained_tokens=trained,
        seconds=sum(step.seconds for step in steps),
    )


def as_metrics(event: Event) -> dict[str, Any] | None:
    """An event as the object that is written to metrics.jsonl; None if it is not a measurement."""
    if isinstance(event, Noted):
        return None
    return {
        name: float(f"{value:.9g}") if isinstance(value, float) else value
        for name, value in dataclasses.asdict(event).items()
    }


class LinesFile:
    """A file of one JSON object a line, written through at once; while the disk is full, lines wait."""

    def __init__(self, path: Path, keep_to_step: int) -> None:
        """Start an empty file, or keep the lines up to the step from which the run resumes."""
        # As bytes, for the last line may be cut off within a character; it is left out, as nothing ends it.
        lines = _whole_lines(path) if keep_to_step else []
        kept = [line for number, line in enumerate(lines, 1) if _step_of(line, f"{path}:{number}") <= keep_to_step]
        self.path = path
        write_bytes(path, b"")  # a new file, whoever has a link to the one before
        self.file = open_in_place(path)
        self.waiting = b"".join(line + b"\n" for line in kept)
        self.failed = False
        self._write()

    def close(self) -> None:
        """No more comes."""
        self.file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.waiting += (json.dumps(line, ensure_ascii=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        """Write what waits, whole lines or nothing; training must not end because its log cannot be written."""
        whole = self.file.tell()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) or 0 :]
        except OSError as error:
            self.waiting = self._take_back(whole) + self.waiting
            if not self.failed:
                say(f"Warning: {self.path}: {error.strerror}; lines are kept in memory until it can be written.")
            self.failed = True

    def _take_back(self, start: int) -> bytes:
        """Remove what was written after a place of the file; returns it."""
        self.file.seek(start)
        written = self.file.readall()
        self.file.truncate(start)
        self.file.seek(start)
        return written


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a plain file that an end of line ends; none where there is no file."""
    refuse_links(path.parent, [path.name])
    try:
        with open_plain(path) as file:
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _step_of(line: bytes, where: str) -> int:
    step: Any = parse_object(line, where, nan=True).get("step")
    if whole(0).fits(step):
        return step
    raise UserError("this line has no step", where=where, fix="Remove the file; the run creates it again.")


class MetricsFile(LinesFile):
    """metrics.jsonl."""

    def __call__(self, event: Event) -> None:
        """Write an event; numbers that are not finite, which JSON does not have, become null, with a text."""
        metrics = as_metrics(event)
        if metrics is None:
            return
        bad = {k: str(v) for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
        self.add(metrics | dict.fromkeys(bad) | ({"not_finite": bad} if bad else {}))


class ConsoleSink:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere. Use as a context manager."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.console = console()
        self.total_steps = total_steps
        self.done = first_step
        self.seconds: list[float] = []
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=total_steps, completed=first_step)

    def __enter__(self) -> ConsoleSink:
        """Show the bar."""
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Noted):
            self.console.print(safe(event.text), markup=False)
        elif isinstance(event, Evaluated):
            self.console.print(f"step {event.step}: eval_loss {event.eval_loss:.4f}", markup=False)
        elif self.bar:
            self.bar.update(self.task, completed=event.step, description=self._line(event))

    def log(self, event: Event) -> None:
        """Show a logged step as a line, where there is no bar."""
        if isinstance(event, Stepped) and not self.bar:
            self.seconds.append(event.seconds / max(1, event.step - self.done))
            self.done = event.step
            left = (self.total_steps - event.step) * sorted(self.seconds)[len(self.seconds) // 2]
            say(f"step {event.step}/{self.total_steps}  {self._line(event)}  {left:,.0f} s left")

    @staticmethod
    def _line(event: Stepped) -> str:
        return (
            f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  "
            f"{event.tokens / max(event.seconds, 1e-9):,.0f} tok/s  {event.peak_bytes / 1e9:.2f} GB"
        )
