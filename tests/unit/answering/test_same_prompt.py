"""Whatever the format of the data, inference shows the model the prompt that training showed it, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer, write_jsonl

from qingtune.answering.chat.session import ChatSession
from qingtune.answering.generate import Decoding
from qingtune.answering.speaker import Speaker
from qingtune.data.format import Message, read_conversations
from qingtune.data.prompts import rows_with_prompts
from qingtune.data.tokenize import Template, make_template, prompt_ids, tokenize
from qingtune.errors import UserError

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
ROWS = {
    "instruction": '{"instruction": "Write a post.", "input": "Name: Blue Door", "output": "Fresh!"}',
    "instruction, empty input": '{"instruction": "Write a post.", "input": "", "output": "Fresh!"}',
    "instruction, system": '{"instruction": "Write.", "output": "Fresh!", "system": "Hi.", "history": [["a", "b"]]}',
    "instruction, text": '{"instruction": "Write.", "output": "Fresh!", "text": "### Write. Fresh!"}',
    "messages": '{"messages": [{"role": "user", "content": "Bread?"}, {"role": "assistant", "content": "Seven."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"}',
    "completion": '{"prompt": "Bread?", "completion": " Seven."}',
    "completion, turns": (
        '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}'
    ),
    "text": '{"text": "Fresh bread at seven."}',
}
SYSTEM_PROMPTS = [None, "Be kind.", ""]  # an empty one keeps the template from writing its own


def make_speaker(template: Template, system_prompt: str | None, *, plain: bool) -> Speaker:
    decoder: Any = None  # not asked here
    return Speaker(
        lambda: decoder, template, Decoding(), system_prompt, plain, context_length=512, identity={}, base=Path()
    )


@pytest.mark.parametrize("system_prompt", SYSTEM_PROMPTS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_file_of_prompts_shows_the_prompts_of_training(row: str, system_prompt: str | None, tmp_path: Path) -> None:
    template = make_template(make_tokenizer(DEFAULT_SYSTEM), [])
    path = str(write_jsonl(tmp_path / "rows.jsonl", [json.loads(row)]))
    conversations = read_conversations([path], system_prompt, "raise").conversations
    (sample,) = tokenize(template, conversations, 512, "raise").samples
    ((_, prompt),) = rows_with_prompts(path)
    shown = make_speaker(template, system_prompt, plain=False).ids(prompt)
    assert sample.token_ids[: len(shown)].tolist() == shown
    if conversations[0].text is None:
        answer = template.tokenizer.decode(sample.token_ids[len(shown) :].tolist())
        assert answer == conversations[0].messages[-1].content + "<|im_end|>"


@pytest.mark.parametrize("system_prompt", SYSTEM_PROMPTS)
@pytest.mark.parametrize("chat_template", [CHATML, DEFAULT_SYSTEM, None], ids=["chatml", "default system", "none"])
def test_a_chat_shows_the_prompts_of_training(
    chat_template: str | None, system_prompt: str | None, tmp_path: Path
) -> None:
    template = make_template(make_tokenizer(chat_template), [])
    roles = ["user", "assistant"] * 3
    turns = [{"role": role, "content": f"{role} 说 {number}"} for number, role in enumerate(roles)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]))
    conversations = read_conversations([path], system_prompt, "raise").conversations
    (sample,) = tokenize(template, conversations, 512, "raise").samples
    for place in (1, 3, 5):
        spoken = [Message(turn["role"], turn["content"]) for turn in turns[:place]]  # type: ignore[arg-type]
        shown = ChatSession(template, 1024, system_prompt, spoken).prompt(8)
        assert sample.token_ids[: len(shown)].tolist() == shown
        assert (sample.trained[len(shown) - 1], sample.trained[len(shown)]) == (False, True)


def test_a_model_of_plain_text_goes_on_from_the_prompt_as_it_stands() -> None:
    template = make_template(make_tokenizer(), [])
    shown = make_speaker(template, "Be kind.", plain=True).ids((Message("user", "Fresh bread"),))
    assert shown == prompt_ids(template, "Fresh bread") == template.tokenizer("Fresh bread")["input_ids"]


def test_nothing_is_answered_to_no_tokens() -> None:
    speaker = make_speaker(make_template(make_tokenizer(), []), None, plain=True)
    with pytest.raises(UserError, match="the prompt has no tokens"):
        speaker.answer("")
