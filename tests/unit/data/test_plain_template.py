"""A model without a chat template: its prompts begin and end as the tokenizer lets every text begin and end."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizer_kinds import KINDS

from qingtune.answering.chat.session import ChatSession
from qingtune.data.format import Conversation, Message
from qingtune.data.tokenize import Template, make_template, prompt_ids, tokenize

TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


def made(kind: str) -> tuple[Template, list[int], list[int]]:
    """The template of a tokenizer, and the ids that it puts before and after a text."""
    make, before, after = KINDS[kind]
    template = make_template(make(), [])
    to_ids: Any = template.tokenizer.convert_tokens_to_ids
    whole = template.tokenizer("x")["input_ids"]
    assert whole[: len(before)] == to_ids(before)  # or the kind is not what its name says
    assert whole[len(whole) - len(after) :] == to_ids(after)
    return template, to_ids(before), to_ids(after)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_begin_with_what_the_tokenizer_puts_before_a_text_once(kind: str) -> None:
    template, before, _ = made(kind)
    prompt = prompt_ids(template, TURNS[:3])
    assert prompt[: len(before)] == before
    assert not set(before) & set(prompt[len(before) :]) - {template.end_of_turn}
    samples = tokenize(template, [Conversation(TURNS, "a:1")], 512, "raise").samples
    assert samples[-1].token_ids[: len(prompt)].tolist() == prompt
    assert ChatSession(template, 512, None, list(TURNS[:3])).prompt(8) == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_template_writes_the_same_in_other_tools(kind: str, tmp_path: Any) -> None:
    import transformers

    template, _, _ = made(kind)
    template.tokenizer.save_pretrained(tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": turn.role, "content": turn.content} for turn in TURNS[:3]]
    encoded = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == prompt_ids(template, TURNS[:3])
    again = make_template(theirs, [])
    assert prompt_ids(again, TURNS[:3]) == prompt_ids(template, TURNS[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_the_end_of_text_once(kind: str) -> None:
    template, _, after = made(kind)
    if after:
        assert template.end_of_turn == after[-1]
    sample = tokenize(template, [Conversation(TURNS[:2], "a:1")], 512, "raise").samples[0]
    assert sample.token_ids[-1] == template.end_of_turn
    assert sample.token_ids.tolist().count(template.end_of_turn) == 1 + (template.end_of_turn in sample.token_ids[:1])
    assert template.end_of_turn in template.stop_ids


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_begins_alike_and_is_not_over_at_a_prompts_end(kind: str) -> None:
    template, before, after = made(kind)
    whole = template.tokenizer("Some text")["input_ids"]
    prompt = prompt_ids(template, "Some text")
    assert prompt == whole[: len(whole) - len(after)]
    assert prompt[: len(before)] == before
    (sample,) = tokenize(template, [Conversation((), "a:1", "Some text")], 512, "raise").samples
    assert sample.token_ids.tolist() == [*prompt, template.end_of_turn]


def test_a_models_own_template_decides_for_itself() -> None:
    from conftest import CHATML

    tokenizer = KINDS["byte-level BPE with bos"][0]()
    tokenizer.chat_template = CHATML
    template = make_template(tokenizer, [])
    assert tokenizer.chat_template == CHATML
    assert prompt_ids(template, TURNS[:1])[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
