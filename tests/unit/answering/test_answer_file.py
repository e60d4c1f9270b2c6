"""Answers to a file: in its order, as they come, resumed after a stop, and nothing of the user's overwritten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from qingtune.answering.answer_file import AnswerFile, Question, answer_file, answer_questions, with_seed
from qingtune.answering.generate import Decoding
from qingtune.data.tokenize import Template, make_template
from qingtune.errors import UserError

IDENTITY = {"base model": "abc", "decoding": {"seed": 1}}
STOP = 2


class Counting:
    """Answers a prompt [first, n] with n times the token `first`, then stops; counts the prompts it reads."""

    def __init__(self, slots: int = 2, most: int | None = None) -> None:
        self.slots, self.most = slots, most
        self.read: list[list[int]] = []
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def start(self, ids: Sequence[int], slot: int = 0) -> torch.Tensor:
        if self.most is not None and len(self.read) >= self.most:
            raise KeyboardInterrupt
        self.read.append(list(ids))
        self._held[slot] = [ids[0]] * ids[1]
        return self._logits(slot)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._logits(slot) for slot in range(len(tokens))])

    def move(self, source: int, target: int) -> None:
        self._held[target] = self._held[source]

    def _logits(self, slot: int) -> torch.Tensor:
        held = self._held[slot]
        logits = torch.zeros(320)
        logits[held.pop() if held else STOP] = 1.0
        return logits


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(make_tokenizer(), [STOP])


def questions(count: int, longest: int = 6) -> list[Question]:
    greedy = Decoding(temperature=0, max_new_tokens=4)
    return [Question({"number": n}, [40 + n, n * 5 % longest], with_seed(greedy, n)) for n in range(count)]


def expected(template: Template, asked: Sequence[Question]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for question in asked:
        first, count = question.ids
        text = template.tokenizer.decode([first] * min(count, 4))
        rows.append({**question.values, "answer": text, "answer_ended": count < 4})
    return rows


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_rows_come_in_order_with_their_own_answers(template: Template, slots: int) -> None:
    asked = questions(50)
    found = list(answer_questions(Counting(slots), template, asked))
    assert [row for row, _ in found] == expected(template, asked)
    assert [tokens for _, tokens in found] == [min(question.ids[1] + 1, 4) for question in asked]


def test_rows_come_as_soon_as_those_before_them_are_there(template: Template) -> None:
    decoder = Counting(2)
    found = answer_questions(decoder, template, questions(100))
    next(found)
    assert len(decoder.read) <= 16  # no more than one group of rows was read


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(
    path: Path | None, template: Template, decoder: Counting, *, identity: Any = None, over: bool = False
) -> None:
    file = AnswerFile(path, identity or IDENTITY, overwrite=over)
    asked = questions(20)
    answer_file(file, 20, lambda done: answer_questions(decoder, template, asked[done:]))
    file.finish()


@pytest.mark.parametrize("half", [b"", b'{"number": 99, "ans'])
def test_an_unfinished_file_is_gone_on_with(template: Template, tmp_path: Path, half: bytes) -> None:
    path, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    write(whole, template, Counting())
    with pytest.raises(KeyboardInterrupt):
        write(path, template, Counting(1, most=9))
    kept = len(lines(path))
    assert 0 < kept < 20
    path.write_bytes(path.read_bytes() + half)
    decoder = Counting(1)
    write(path, template, decoder)
    assert len(decoder.read) == 20 - kept
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "whole.jsonl"]


def test_other_settings_do_not_go_on(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(path, template, Counting(1, most=9))
    before = path.read_bytes()
    other = {**IDENTITY, "decoding": {"seed": 2}}
    with pytest.raises(UserError, match="decoding differ"):
        write(path, template, Counting(), identity=other)
    assert path.read_bytes() == before
    write(path, template, Counting(), identity=other, over=True)
    assert len(lines(path)) == 20


def test_a_file_that_is_there_stays(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="already exists"):
        write(path, template, Counting())
    assert path.read_text() == "mine\n"
    write(path, template, Counting(), over=True)
    assert len(lines(path)) == 20


def test_a_place_that_cannot_be_written_is_told(template: Template, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "missing" / "answers.jsonl", template, Counting())


def test_without_a_file_rows_go_to_stdout(template: Template, capsys: pytest.CaptureFixture[str]) -> None:
    write(None, template, Counting())
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_each_row_draws_for_itself() -> None:
    assert [with_seed(Decoding(seed=7), row).seed for row in (0, 1, 5)] == [7, 8, 12]
    assert with_seed(Decoding(seed=2**32 - 1), 1).seed == 0
