"""Long conversations: ids are those of whole texts, for every kind of tokenizer, and the work grows with the turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, THINKING_TEMPLATE, make_tokenizer, write_jsonl
from tokenizer_kinds import KINDS, with_chatml

from qingtune.data import encoder as module
from qingtune.data.encoder import Encoder, GrowingText
from qingtune.data.format import Conversation, Message, read_conversations
from qingtune.data.prompts import asked_rows, rows_with_prompts
from qingtune.data.read import Fault
from qingtune.data.rules import Rules
from qingtune.data.tokenize import Sample, make_template, tokenize
from qingtune.errors import UserError

PIECES = [
    "hello", " ", "  two", "\n", "\n\n", "店", "早上好。", "a ", "<", "|", "<think>x</think>", "\n\nb", "é", "the",
    "<|im", "<|im_end|>", "\u3000", "ing", "\t",
]  # fmt: skip


def conversation(seed: int, turns: int) -> Conversation:
    draw = random.Random(seed)
    messages: list[Message] = [Message("system", "s ")] * draw.randint(0, 1)
    for number in range(turns):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 6)))
        if number % 2:
            text = text.replace("<|im_end|>", "")
        messages += [Message("assistant" if number % 2 else "user", text if text.strip() else "x")]
    return Conversation(tuple(messages), f"t:{seed}")


def samples(template: Any, rows: list[Conversation]) -> list[tuple[list[int], list[bool]]]:
    made: list[Sample] = tokenize(template, rows, 1 << 20, "drop").samples
    return [(sample.token_ids.tolist(), sample.trained.tolist()) for sample in made]


@pytest.mark.parametrize("chat_template", [CHATML, THINKING_TEMPLATE, None], ids=["chatml", "thinking", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_whole_texts(kind: str, chat_template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind][0]()
    if chat_template is not None:
        tokenizer = with_chatml(tokenizer, chat_template)
    template = make_template(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")] if chat_template else [5])
    rows = [conversation(seed, 10) for seed in range(15)]
    grown = samples(template, rows)
    monkeypatch.setattr(GrowingText, "ids", lambda self, text: self._encoder.ids(text))
    assert grown == samples(template, rows)
    assert grown


def test_only_new_text_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    template = make_template(make_tokenizer(), [2])
    lengths: list[int] = []
    ids = Encoder.ids

    def counted(self: Encoder, text: str) -> list[int]:
        lengths.append(len(text))
        return ids(self, text)

    monkeypatch.setattr(Encoder, "ids", counted)
    turns = tuple(Message("assistant" if n % 2 else "user", "some words to say") for n in range(200))
    assert len(samples(template, [Conversation(turns, "t:1")])) == 1
    assert max(lengths) < 300  # of 200 turns of 50 characters


def test_a_tokenizer_that_reads_on_over_control_tokens_gets_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cut would change ids, none is made."""
    template = make_template(make_tokenizer(), [2])
    plain = module.encode

    def by_length(tokenizer: Any, text: str, **options: Any) -> list[int]:
        return [len(text), *plain(tokenizer, text, **options)]

    monkeypatch.setattr(module, "encode", by_length)
    growing = GrowingText(template.encoder)
    text = ""
    for number in range(5):
        text += f"<|im_start|>user\n{number}<|im_end|>\n"
        assert growing.ids(text) == template.encoder.ids(text)


def test_rows_of_too_many_turns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "assistant" if n % 2 else "user", "content": "x"} for n in range(10)]
    write_jsonl(Path("t.jsonl"), [{"messages": turns}, {"messages": turns[:2]}])
    rules = Rules(max_row_turns=9)
    assert [str(fault) for fault in read_conversations(["t.jsonl"], None, "skip", rules).faults] == [
        "t.jsonl:1: 10 turns; raise max_row_turns if they are meant"
    ]
    assert isinstance(next(iter(asked_rows("t.jsonl", None, rules))), Fault)
    with pytest.raises(UserError, match="10 turns"):
        list(rows_with_prompts("t.jsonl", rules))
    assert read_conversations(["t.jsonl"], None, "raise").rows == 2
