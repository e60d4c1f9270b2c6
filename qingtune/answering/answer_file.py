"""Answers to a file of prompts: many at a time, written in the file's order as they come, resumed after a stop."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from qingtune.answering.generate import Decoder, Decoding, decode_answer, generate_many
from qingtune.data.tokenize import Template
from qingtune.errors import UserError
from qingtune.files.json_files import INDEX_BYTES, read_object
from qingtune.files.write import open_device, open_in_place, write_bytes, write_json
from qingtune.output.console import give, say

SLOTS = 16  # prompts of a file answered at a time
# Rows that are sorted by length and answered together, for each slot; more would hold answers back longer.
ROWS_A_SLOT = 8


@dataclass(frozen=True)
class Question:
    """A row of the file, the ids of its prompt, and how to answer it."""

    values: dict[str, Any]
    ids: list[int]
    decoding: Decoding


def answer_questions(
    decoder: Decoder, template: Template, questions: Sequence[Question]
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row with its answer, in order, and how many tokens that took, as soon as it and all before it are
    there."""
    window = ROWS_A_SLOT * decoder.slots
    for start in range(0, len(questions), window):
        group = questions[start : start + window]
        ready: dict[int, list[int]] = {}
        following = 0
        prompts, decodings = [question.ids for question in group], [question.decoding for question in group]
        for number, tokens in generate_many(decoder, prompts, decodings, template.stop_ids):
            ready[number] = tokens
            while following in ready:
                tokens = ready.pop(following)
                ended = tokens[-1] in template.stop_ids
                answer = {"answer": decode_answer(template, tokens), "answer_ended": ended}
                yield {**group[following].values, **answer}, len(tokens)
                following += 1


@dataclass(frozen=True)
class AnswerFile:
    """The file for the answers. Until it is complete, a second file next to it says what they answer and how.

    Attributes:
        path: of the file; None for stdout, where nothing is resumed.
        identity: everything that decides the answers, as JSON values.
        overwrite: replace a file that is there.
        setting: by which the user chose the place; there is one named overwrite_... to replace what is there.
    """

    path: Path | None
    identity: dict[str, Any]
    _: KW_ONLY
    overwrite: bool
    setting: str = "output_file"

    def open(self) -> tuple[TextIO | None, int]:
        """The file to write to, None for stdout, and how many rows it holds already.

        Raises:
            UserError: it cannot be written, or holds something else.
        """
        if self.path is None:
            return None, 0
        try:
            rows = self.rows_there()
            if rows:
                say(f"{self.path}: {rows:,} answers are already written; resuming.")
            if self.path.exists() and not self.path.is_file():  # such as /dev/null or a pipe
                return io.TextIOWrapper(io.BufferedWriter(open_device(self.path)), encoding="utf-8"), 0
            if not rows:
                write_bytes(self.path, b"")
                write_json(_state_of(self.path), self.identity)
            stream = io.TextIOWrapper(io.BufferedRandom(open_in_place(self.path)), encoding="utf-8", newline="\n")
            for _ in range(rows):
                stream.readline()
            stream.seek(stream.tell())
            stream.truncate()  # a row that was half written goes
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.path)) from None
        return stream, rows

    def finish(self) -> None:
        """The file is whole."""
        if self.path:
            _state_of(self.path).unlink(missing_ok=True)

    def rows_there(self) -> int:
        """Complete rows of an earlier start that this one resumes from.

        Raises:
            UserError: the file holds something else.
        """
        assert self.path
        if self.overwrite or not self.path.is_file() or not self.path.stat().st_size:
            return 0
        refuse_finished(self.path, self.setting)
        before = read_object(_state_of(self.path), INDEX_BYTES)
        if other := sorted(name for name in self.identity if before.get(name) != self.identity[name]):
            raise UserError(
                f"{self.setting} holds answers made with other settings: {', '.join(other)} differ",
                where=str(self.path),
                fix=f"Pass the same settings to resume, choose another {self.setting}, "
                f"or pass --overwrite_{self.setting}.",
            )
        with self.path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)


def _state_of(path: Path) -> Path:
    """Is next to an incomplete file."""
    return path.with_name(f"{path.name}.unfinished.json")


def refuse_finished(path: Path, setting: str = "output_file") -> None:
    """Refuse a file that has content and cannot be resumed.

    Raises:
        UserError: it is there.
    """
    if path.is_file() and path.stat().st_size and not _state_of(path).exists():
        raise UserError(
            f"{setting} already exists", where=str(path), fix=f"Choose another one, or pass --overwrite_{setting}."
        )


def answer_file(
    file: AnswerFile, count: int, rows_after: Callable[[int], Iterator[tuple[dict[str, Any], int]]]
) -> None:
    """Write every one of `count` rows that is not there yet, as soon as it comes. `finish` is left to the caller.

    Args:
        rows_after: how many rows are there -> the others, in order, each with the tokens that it took.

    Raises:
        UserError: the file cannot be written.
    """
    stream, done = file.open()
    began, tokens_made = time.perf_counter(), 0
    try:
        for row, tokens in rows_after(done):
            line = json.dumps(row, ensure_ascii=False, default=str)
            if stream is None:
                give(line)
            else:
                print(line, file=stream, flush=True)
            done, tokens_made = done + 1, tokens_made + tokens
            if stream or not sys.stdout.isatty():
                rate = tokens_made / (time.perf_counter() - began)
                say(f"{done}/{count}" + f"  {rate:.0f} tok/s" * bool(tokens_made))
    finally:
        if stream:
            stream.close()


def with_seed(decoding: Decoding, row: int) -> Decoding:
    """A row's own draws, which do not depend on the rows around it."""
    return replace(decoding, seed=(decoding.seed + row) % 2**32)
