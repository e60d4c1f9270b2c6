"""A run's folder -> what its page shows. The only place that knows the files; each of them may be missing."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qingtune.config.roles import is_answer
from qingtune.errors import UserError
from qingtune.files.json_files import (
    INDEX_BYTES,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    list_of,
    number,
    open_plain,
    parse_object,
    read_object_if_there,
    whole,
)
from qingtune.output.redaction import redact, redact_values
from qingtune.runs.measures import tokens_per_second
from qingtune.runs.record import FACTS, METRICS, SAMPLES, SETTINGS, Record, read_record

EVALUATION = "evaluation.json"
PREDICTIONS = ("predictions_before.jsonl", "predictions_after.jsonl")
MOST_SAMPLES = 12
# What is read of each logged line, as training/events.py writes it; speed is tokens / seconds.
LOGGED = ("epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "peak_bytes")
_STEP = whole(0, 2**63 - 1)  # that a column of whole numbers holds
_FACTS = {"data": OBJECT, "machine": OBJECT, "versions": OBJECT, "total_steps": whole(0)}


@dataclass(frozen=True)
class Curves:
    """metrics.jsonl as columns; numbers that are missing or not finite are NaN.

    Attributes:
        steps: of the logged lines, int [N].
        values: by the names of LOGGED, float [N] each.
        eval_steps: of the evaluations, int [M].
        eval_losses: mean over the trained tokens, in nats, float [M].
        eval_seconds: what they took, float [M].
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in LOGGED})
    eval_steps: array[int] = field(default_factory=lambda: array("q"))
    eval_losses: array[float] = field(default_factory=lambda: array("d"))
    eval_seconds: array[float] = field(default_factory=lambda: array("d"))

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole run; see runs/measures.py."""
        return tokens_per_second(self.values["tokens"], self.values["seconds"])

    def known(self, name: str) -> list[float]:
        """The numbers of a column that are there."""
        return [value for value in self.values[name] if math.isfinite(value)]

    @property
    def eval_loss_before(self) -> float | None:
        """Of the evaluation before the first step; None without one."""
        return self.eval_losses[0] if self.eval_steps and self.eval_steps[0] == 0 else None

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Step and loss of each evaluation after the first step."""
        return [(step, loss) for step, loss in zip(self.eval_steps, self.eval_losses, strict=True) if step > 0]


@dataclass(frozen=True)
class Answers:
    """A prompt with the answers before and after training, and the one in the data; None where there is none."""

    prompt: str
    reference: str | None
    before: str | None
    after: str | None


@dataclass(frozen=True)
class PageMetric:
    """A measure of answers; None where there is none. `sure`: the difference's 95 % interval excludes zero."""

    name: str
    before: float | None
    after: float | None
    difference: float | None
    interval: tuple[float, float] | None
    sure: bool


@dataclass(frozen=True)
class Source:
    """All that the page shows, without secrets.

    Attributes:
        folder: of the run, as the user named it.
        settings: train_config.json.
        record: of a finished run; None while it is not.
        facts: what the run knew when it started: data, machine, steps to do.
        curves: what was measured.
        answers: at most MOST_SAMPLES.
        steps_of_answers: the steps before and after which they were given; None if the files do not say.
        more_answers: how many more there are.
        metrics: of `qingtune evaluate`.
        evaluated: how many rows it asked, and of which files; None where that is not said.
    """

    folder: str
    settings: dict[str, Any]
    record: Record | None
    facts: dict[str, Any]
    curves: Curves
    answers: list[Answers]
    steps_of_answers: tuple[int, int] | None
    more_answers: int
    metrics: list[PageMetric]
    evaluated: tuple[int, list[str]] | None

    @property
    def results(self) -> dict[str, Any]:
        """Of the finished run; empty while it is not."""
        return self.record.results if self.record else {}


def read_run(folder: Path) -> Source:
    """Read what a run has left so far.

    Raises:
        UserError: a file is broken.
    """
    answers, steps = _eval_samples(folder / SAMPLES)
    if not answers:
        answers = _predictions(folder)
    record = read_record(folder)
    metrics, evaluated = _evaluation(folder / EVALUATION)
    facts = _json(folder / FACTS, _FACTS)
    check_fields(facts.get("machine") or {}, {"memory_bytes": number(least=0)}, f"{folder / FACTS}: machine")
    return Source(
        folder=redact(str(folder)),
        settings=_json(folder / SETTINGS, {"eval_data_path": list_of(TEXT)}),
        record=Record(**redact_values(vars(record))) if record else None,
        facts=facts,
        curves=read_curves(folder / METRICS),
        answers=answers[:MOST_SAMPLES],
        steps_of_answers=steps,
        more_answers=max(0, len(answers) - MOST_SAMPLES),
        metrics=metrics,
        evaluated=evaluated,
    )


def _json(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """An object without secrets, of whose fields some are checked; empty if there is no such file."""
    content = redact_values(read_object_if_there(path, INDEX_BYTES, nan=True) or {})
    check_fields(content, kinds, str(path))
    return content


def _each_line(path: Path, take: Callable[[dict[str, Any]], object]) -> None:
    """Hand over each object in a file of JSON lines, if there is one; a line still being written is left out."""
    try:
        opened = open_plain(path)
    except FileNotFoundError:
        return
    with opened as file:  # as bytes, for such a line may end within a character
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                take(parse_object(line, f"{path}:{number}", nan=True))
            except KeyError as error:
                raise UserError(f"{error.args[0]} is missing in this line", where=f"{path}:{number}") from None
            except (ValueError, TypeError, OverflowError) as error:
                raise UserError(f"this line is broken ({error})", where=f"{path}:{number}") from None


def read_curves(path: Path) -> Curves:
    """What a run logged; nothing if there is no such file.

    Raises:
        UserError: it is broken.
    """
    curves = Curves()

    def take(line: dict[str, Any]) -> None:
        step = _step(line)
        if "eval_loss" in line:
            curves.eval_steps.append(step)
            curves.eval_losses.append(_number(line["eval_loss"]))
            curves.eval_seconds.append(_number(line.get("eval_seconds")))
        else:
            curves.steps.append(step)
            for name, column in curves.values.items():
                column.append(_number(line.get(name)))

    _each_line(path, take)
    return curves


def _step(line: dict[str, Any]) -> int:
    if not _STEP.fits(line["step"]):
        raise ValueError(f"step is {line['step']!r}, not a whole number")
    return line["step"]


def _number(value: Any) -> float:
    """NaN for null; a number that other tools wrote as text, such as "nan", is one too."""
    return math.nan if value is None else float(value)


def _eval_samples(path: Path) -> tuple[list[Answers], tuple[int, int] | None]:
    """The answers of the first and the last evaluation."""
    by_step: dict[int, dict[str, dict[str, Any]]] = {}

    def take(line: dict[str, Any]) -> None:
        for name in ("prompt", "answer"):
            if not isinstance(line[name], str):
                raise ValueError(f"{name} is not text")
        row = redact_values(line)
        by_step.setdefault(_step(line), {})[row["prompt"]] = row

    _each_line(path, take)
    if not by_step:
        return [], None
    first, last = min(by_step), max(by_step)
    earlier = by_step[first] if first < last else {}
    answers = [
        Answers(row["prompt"], row.get("reference"), earlier.get(prompt, {}).get("answer"), row["answer"])
        for prompt, row in by_step[last].items()
    ]
    return answers, (first, last)


def _predictions(folder: Path) -> list[Answers]:
    """The answers of `qingtune evaluate`: rows of the data, each with its answer, in the same order in both files."""
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    for name, rows in zip(PREDICTIONS, (before, after), strict=True):
        _each_line(folder / name, rows.append)
    answers: list[Answers] = []
    for one, two in redact_values(list(zip_longest(before, after, fillvalue={}))):
        if "answer" in one or "answer" in two:
            prompt, reference = _asked(two or one)
            answers.append(Answers(prompt, reference, one.get("answer"), two.get("answer")))
    return answers


def _asked(row: dict[str, Any]) -> tuple[str, str | None]:
    """Prompt and answer of a row of data as text to read, whichever of the formats it has."""
    turns = row.get("messages") or row.get("conversations")
    if turns:
        closed = is_answer(turns[-1])
        return _as_text(turns[:-1] if closed else turns) or "", _as_text(turns[-1:]) if closed else None
    if "prompt" in row:
        return _as_text(row["prompt"]) or "", _as_text(row.get("completion"))
    parts = [str(row[name]) for name in ("system", "instruction", "input") if row.get(name)]
    return "\n\n".join(parts), _as_text(row.get("output"))


def _as_text(turns: Any) -> str | None:
    if isinstance(turns, list):
        return "\n\n".join(str(turn.get("content", turn.get("value", ""))) for turn in turns)
    return None if turns is None else str(turns)


def _evaluation(path: Path) -> tuple[list[PageMetric], tuple[int, list[str]] | None]:
    """What `qingtune evaluate` measured, and over how many rows of which files; None where that is not said."""
    content = _json(path, {})
    rows, data = content.get("rows"), content.get("data")
    evaluated = (rows, list(data)) if isinstance(rows, int) and isinstance(data, dict) else None
    try:
        return [_metric(name, about) for name, about in dict(content.get("metrics", {})).items()], evaluated
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"`qingtune evaluate` did not write this ({error})", where=str(path)) from None


def _metric(name: str, about: dict[str, Any]) -> PageMetric:
    parts = [about[part] or {} for part in ("before", "after", "difference")]
    before, after, difference = (None if part.get("value") is None else float(part["value"]) for part in parts)
    ends = parts[-1].get("interval")
    interval = (float(ends[0]), float(ends[1])) if ends else None
    return PageMetric(name, before, after, difference, interval, about["difference_excludes_zero"] is True)
