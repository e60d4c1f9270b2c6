"""Answers decoded token by token: the same text as in one go, for every kind of tokenizer, at a cost that is linear."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer
from tokenizer_kinds import KINDS, with_chatml

from qingtune.answering import generate as module
from qingtune.answering.generate import MOST_WAITING, Answer, decode_answer
from qingtune.data.tokenize import Template, make_template

BYTES_BY_TOKEN = {"Llama 2", "Gemma"}  # whose decoder replaces all bytes in a row where one of them does not fit
TEXTS = [
    "Hello, world!  Two spaces, a\ttab\n\nand lines.",
    " a space in front",
    "  two",
    "龙🐉ábc👨‍👩‍👧‍👦 终 … 🇨🇳🥖🥖",
    "你好，世界。\nＡ１２ ﬁ",
    "e\u0301 \u00a0 \u3000x",
    "don't stop . now , please !",
]


@cache
def template_of(kind: str) -> Template:
    return make_template(with_chatml(KINDS[kind][0](), CHATML), [])


def streamed(template: Template, ids: Sequence[int]) -> str:
    answer = Answer(template, ids)
    pieces = list(answer)
    assert "".join(pieces) == answer.text
    assert all(pieces)
    assert answer.tokens == list(ids)
    return answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_one_go(kind: str) -> None:
    template = template_of(kind)
    tokenizer: Any = template.tokenizer
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert streamed(template, ids) == decode_answer(template, ids)
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")  # special, so no part of the text
        assert streamed(template, [start, *ids, start, *ids]) == decode_answer(template, [*ids, *ids])


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_give_the_text_of_one_go(kind: str) -> None:
    template = template_of(kind)
    tokenizer: Any = template.tokenizer
    draw = random.Random(kind)
    every = range(len(tokenizer))
    of_bytes = {n for n in every if kind in BYTES_BY_TOKEN and tokenizer.convert_ids_to_tokens(n).startswith("<0x")}
    others = [n for n in every if n not in of_bytes]
    for _ in range(200):
        ids = draw.choices(others, k=draw.randint(1, 40))
        for _ in range(draw.randint(0, 3) if of_bytes else 0):
            character = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in draw.choice("龙🐉áa").encode()]
            place = draw.randint(0, len(ids))
            ids[place:place] = character * draw.randint(1, 3)
        whole = decode_answer(template, ids)
        if of_bytes and "\ufffd" in whole:
            continue  # one character was put into another
        assert streamed(template, ids) == whole


@pytest.mark.parametrize("kind", sorted(BYTES_BY_TOKEN))
def test_bytes_that_are_no_character_leave_those_before_them(kind: str) -> None:
    template = template_of(kind)
    tokenizer: Any = template.tokenizer
    ids = tokenizer.convert_tokens_to_ids([*(f"<0x{byte:02X}>" for byte in "龙龙".encode()), "<0xFF>", "a"])
    assert decode_answer(template, ids) == "\ufffd" * 7 + "a"
    assert streamed(template, ids) == "龙龙\ufffda"
    assert streamed(template, ids[:5]) == "龙\ufffd\ufffd"


@pytest.mark.parametrize("text", ["some words to say. " * 200, "龙🐉" * 300], ids=["words", "characters"])
@pytest.mark.parametrize("kind", ["byte-level BPE", "Llama 2"])
def test_the_cost_is_linear(kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(kind)
    tokenizer: Any = template.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = 0

    def counted(template: Template, tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode_answer(template, tokens)

    monkeypatch.setattr(module, "decode_answer", counted)
    assert streamed(template, ids) == text
    assert decoded < 16 * len(ids)


def test_what_never_becomes_a_character_is_shown_in_time() -> None:
    template = make_template(make_tokenizer(), [])
    tokenizer: Any = template.tokenizer
    half = tokenizer("龙", add_special_tokens=False)["input_ids"][0]
    answer = Answer(template, [half] * (3 * MOST_WAITING))
    assert len(list(answer)) == 3
    assert answer.text == "\ufffd" * (3 * MOST_WAITING)
