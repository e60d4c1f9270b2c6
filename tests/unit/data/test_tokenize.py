"""A sample is the prompt of inference, token for token, then the answer and its end, and only these are trained."""

from __future__ import annotations

import string
from functools import cache
from itertools import groupby
from typing import Any

import conftest
import numpy as np
import pytest
from conftest import CHATML, make_tokenizer
from tokenizer_kinds import TEMPLATES

from qingtune.data.format import Conversation, Message
from qingtune.data.read import Fault
from qingtune.data.report import describe, show_example, summarize
from qingtune.data.tokenize import Sample, Template, Tokenized, make_template, prompt_ids
from qingtune.data.tokenize import tokenize as tokenize_all
from qingtune.errors import UserError

END = "<|im_end|>"
BEFORE_ANSWER = {"thinking": "<think>\n\n</think>\n\n", "plain style": " "}
SPLIT = ("thinking", "no end of turn")  # these write an earlier turn otherwise than the turn that is being answered
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
QUESTION, ANSWER = Message("user", "Where is bread? 面包在哪"), Message("assistant", "At the Blue Door 🥖 #bread")
THREE_TURNS = tuple(
    Message(role, text)
    for number in range(3)
    for role, text in (("user", f"Question {number}?"), ("assistant", f"Answer {number}, 第{number}。"))
)


@cache
def template_of(name: str) -> Template:
    return make_template(make_tokenizer(TEMPLATES[name]), [])


def tokenize(
    template: Template, *messages: Message, text: str | None = None, limit: int = 512, on_long: str = "drop"
) -> Tokenized:
    return tokenize_all(template, [Conversation(messages, "a.jsonl:1", text)], limit, on_long)


def only_sample(template: Template, *messages: Message) -> Sample:
    (sample,) = tokenize(template, *messages).samples
    return sample


def decode(template: Template, ids: Any) -> str:
    return template.tokenizer.decode(list(ids))


def trained_parts(template: Template, sample: Sample) -> list[str]:
    runs = groupby(zip(sample.token_ids.tolist(), sample.trained.tolist(), strict=True), key=lambda pair: pair[1])
    return [decode(template, [token for token, _ in run]) for trained, run in runs if trained]


# --- What is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [ANSWER.content, "\n\nafter newlines", "  after spaces", "before a newline\n", "七"])
@pytest.mark.parametrize("before", [(QUESTION,), (Message("system", "Be brief."), QUESTION)])
def test_one_turn_is_the_prompt_of_inference_then_the_trained_answer(
    name: str, answer: str, before: tuple[Message, ...]
) -> None:
    template = template_of(name)
    sample = only_sample(template, *before, Message("assistant", answer))
    prompt = prompt_ids(template, before)
    assert sample.token_ids[: len(prompt)].tolist() == prompt
    assert sample.trained.tolist() == [place >= len(prompt) for place in range(len(sample.token_ids))]
    assert decode(template, sample.token_ids[len(prompt) :]) == BEFORE_ANSWER.get(name, "") + answer + END
    assert sample.token_ids[-1] == template.end_of_turn


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in SPLIT])
def test_several_turns_train_each_answer_and_its_end_in_one_sample(name: str) -> None:
    template = template_of(name)
    sample = only_sample(template, *THREE_TURNS)
    lead = BEFORE_ANSWER.get(name, "")
    assert trained_parts(template, sample) == [lead + turn.content + END for turn in THREE_TURNS[1::2]]
    for place in (1, 3, 5):
        prompt = prompt_ids(template, THREE_TURNS[:place])
        assert sample.token_ids[: len(prompt)].tolist() == prompt
        assert (sample.trained[len(prompt) - 1], sample.trained[len(prompt)]) == (False, True)


@pytest.mark.parametrize("name", SPLIT)
def test_turns_written_otherwise_later_are_a_sample_each(name: str) -> None:
    template = template_of(name)
    tokenized = tokenize(template, *THREE_TURNS)
    assert tokenized.split_conversations == 1
    assert len(tokenized.samples) == 3
    for sample, place in zip(tokenized.samples, (1, 3, 5), strict=True):
        prompt = prompt_ids(template, THREE_TURNS[:place])
        assert sample.token_ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(sample.trained).tolist() == list(range(len(prompt), len(sample.token_ids)))
        assert trained_parts(template, sample) == [BEFORE_ANSWER.get(name, "") + THREE_TURNS[place].content + END]


def test_newline_after_the_end_of_turn_is_not_trained() -> None:
    sample = only_sample(template_of("default system"), *THREE_TURNS)
    ends = np.flatnonzero(sample.token_ids == template_of("default system").end_of_turn)
    assert ends[-1] == len(sample.token_ids) - 1
    newlines = [end + 1 for end in ends[:-1]]
    assert decode(template_of("default system"), sample.token_ids[newlines]) == "\n" * 6
    assert not sample.trained[newlines].any()


def test_thoughts_of_the_last_turn_are_trained_and_earlier_ones_stripped() -> None:
    template = template_of("thinking")
    thoughts = [Message("assistant", f"<think>\nthought {number}\n</think>\n\nanswer {number}") for number in range(2)]
    first, second = tokenize(template, QUESTION, thoughts[0], QUESTION, thoughts[1]).samples
    assert trained_parts(template, first) == [thoughts[0].content + END]
    assert trained_parts(template, second) == [thoughts[1].content + END]
    assert "thought 0" not in decode(template, second.token_ids)


def test_answer_whose_start_melts_into_the_prompts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "TEXTS", ["\n" * 30, *conftest.TEXTS])
    template = make_template(make_tokenizer(), [])
    seam = [template.tokenizer(text)["input_ids"] for text in ("\n\n\nH", "\n", "\n\nH")]
    assert seam[0] != seam[1] + seam[2]  # the text in one go has other ids than its parts
    turns = (QUESTION, Message("assistant", "\n\nHere."), QUESTION, Message("assistant", "\n\nThere."))
    samples = tokenize(template, *turns).samples
    assert [trained_parts(template, sample) for sample in samples] == [[f"\n\nHere.{END}"], [f"\n\nThere.{END}"]]
    for sample, place in zip(samples, (1, 3), strict=True):
        prompt = prompt_ids(template, turns[:place])
        assert sample.token_ids[: len(prompt)].tolist() == prompt


def test_answers_get_no_space_of_their_own_from_a_sentencepiece_tokenizer() -> None:
    from transformers import LlamaTokenizer

    letters = ["<unk>", "<s>", "</s>", "▁", *string.printable]
    tokenizer = LlamaTokenizer(vocab={token: number for number, token in enumerate(letters)}, merges=[])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    template = make_template(tokenizer, [])
    text = "".join(f"<{turn.role}>\n{turn.content}</s>\n" for turn in THREE_TURNS)
    assert (
        only_sample(template, *THREE_TURNS).token_ids.tolist()
        == (tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"])
    )


def test_plain_text_is_trained_whole() -> None:
    template = template_of("chatml")
    (sample,) = tokenize(template, text="Fresh bread at seven.").samples
    assert decode(template, sample.token_ids) == f"Fresh bread at seven.{END}"
    assert sample.trained.all()
    assert sample.trained_tokens == len(sample.token_ids) - 1


# --- What is refused, cut or left out --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"stop {END} here", "<|im_start|>user", "a<|endoftext|>"])
def test_control_tokens_in_what_is_trained_are_refused(text: str) -> None:
    tokenized = tokenize(template_of("chatml"), QUESTION, Message("assistant", text))
    assert not tokenized.samples
    (fault,) = tokenized.faults
    assert fault.origin == "a.jsonl:1"
    assert "control token" in fault.reason
    assert tokenize(template_of("chatml"), text=text).faults


def test_a_template_that_raises_refuses_the_row_with_its_reason() -> None:
    template = make_template(make_tokenizer(STRICT), [])
    (fault,) = tokenize(template, Message("system", "Be brief."), QUESTION, ANSWER).faults
    assert "no system role here" in fault.reason
    assert tokenize(template, QUESTION, ANSWER).samples


def test_a_template_that_writes_another_turn_than_it_prompts_for_is_refused() -> None:
    template = make_template(make_tokenizer(CHATML.replace("|>assistant\n", "|>model\n")), [])
    (fault,) = tokenize(template, QUESTION, ANSWER).faults
    assert "directly after its prompt" in fault.reason


def test_long_samples_are_dropped_cut_or_an_error() -> None:
    template = template_of("chatml")
    whole = only_sample(template, QUESTION, ANSWER)
    limit = len(whole.token_ids) - 3
    dropped = tokenize(template, QUESTION, ANSWER, limit=limit)
    assert (dropped.samples, dropped.too_long) == ([], ["a.jsonl:1"])
    cut = tokenize(template, QUESTION, ANSWER, limit=limit, on_long="truncate")
    assert cut.truncated == 1
    assert cut.samples[0].token_ids.tolist() == whole.token_ids[:limit].tolist()
    assert cut.samples[0].trained.tolist() == whole.trained[:limit].tolist()
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*max_seq_length"):
        tokenize(template, QUESTION, ANSWER, limit=limit, on_long="raise")
    assert tokenize(template, QUESTION, ANSWER, limit=limit + 3, on_long="raise").samples


def test_a_sample_cut_within_its_prompt_is_no_sample() -> None:
    template = template_of("chatml")
    prompt = prompt_ids(template, [QUESTION])
    tokenized = tokenize(template, QUESTION, ANSWER, limit=len(prompt), on_long="truncate")
    assert (tokenized.samples, tokenized.untrained) == ([], ["a.jsonl:1"])
    assert tokenize(template, QUESTION, ANSWER, limit=len(prompt) + 1, on_long="truncate").samples


# --- The template itself, the report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_at_the_end_of_turn_and_where_the_model_does(name: str) -> None:
    template = make_template(make_tokenizer(TEMPLATES[name]), [7])
    assert template.stop_ids == {7, template.end_of_turn, template.tokenizer.eos_token_id}
    assert template.appended == (name == "no end of turn")


@pytest.mark.parametrize(
    ("chat_template", "stop_ids", "notice"),
    [
        (CHATML, [], ""),
        (CHATML, [2], ""),
        (CHATML, [0], "looks like a base model"),
        (None, [2], "has no chat template"),
        (TEMPLATES["no end of turn"], [2], "is added after each answer"),
    ],
)
def test_notices_on_the_template(chat_template: str | None, stop_ids: list[int], notice: str) -> None:
    notices = make_template(make_tokenizer(chat_template), stop_ids).notices
    assert [notice in text for text in notices] == [True] * (notice != "")


@pytest.mark.parametrize("chat_template", ["{{ raise_exception('never') }}", "{% if %}"])
def test_a_template_that_always_fails_is_an_error(chat_template: str) -> None:
    with pytest.raises(UserError, match="chat template fails"):
        make_template(make_tokenizer(chat_template), [])


def test_a_tokenizer_without_an_end_is_an_error() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that can end"):
        make_template(tokenizer, [])


def test_the_report_counts_what_is_trained() -> None:
    template = template_of("thinking")
    rows = [Conversation(THREE_TURNS, "a:1"), Conversation((QUESTION, ANSWER), "a:2")]
    tokenized = tokenize_all(template, rows, 90, "drop")
    tokenized.untrained.append("a:3")
    tokenized.faults.append(Fault("a:4", "no"))
    tokenized.too_long = [f"a:{number}" for number in range(10, 17)]
    report = "\n".join(describe("Data", summarize(12, tokenized)))
    tokens = sum(len(sample.token_ids) for sample in tokenized.samples)
    trained = sum(int(sample.trained.sum()) for sample in tokenized.samples)
    assert (tokenized.rows_used, tokenized.rows_too_long, tokenized.rows_untrained) == (2, 0, 0)
    assert f"Data: {len(tokenized.samples)} samples of" in report
    assert f"{tokens} tokens, {trained} of them trained ({trained / tokens:.0%})" in report
    assert f"longest {max(len(sample.token_ids) for sample in tokenized.samples)}" in report
    assert "1 conversations trained turn by turn" in report
    assert "a:14 ..." in report
    assert "a:15" not in report


def test_the_example_marks_the_trained_parts() -> None:
    template = template_of("chatml")
    shown = show_example(template.tokenizer, only_sample(template, *THREE_TURNS[:4]))
    turns = [
        f"<|im_start|>user\n{q.content}{END}\n<|im_start|>assistant\n>>>{a.content}{END}<<<"
        for q, a in (THREE_TURNS[:2], THREE_TURNS[2:4])
    ]
    assert shown == "\n".join(turns)
