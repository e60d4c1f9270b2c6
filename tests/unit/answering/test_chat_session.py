"""The turns of a chat: what of them the model is shown, and that none is lost unasked."""

from __future__ import annotations

import pytest
from conftest import CHATML, THINKING_TEMPLATE, make_tokenizer

from qingtune.answering.chat.session import ChatSession
from qingtune.data.format import Message
from qingtune.data.tokenize import Template, make_template, prompt_ids


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(make_tokenizer(), [2])


def test_chat_drops_the_oldest_turns_to_fit(template: Template) -> None:
    session = ChatSession(template, context_length=120, system_prompt="Be brief.")
    sizes: list[int] = []
    for number in range(8):
        session.turns.append(Message("user", f"question {number}?"))
        ids = session.prompt(room_for_answer=40)
        sizes.append(len(ids))
        assert len(ids) <= 80
        assert ids == prompt_ids(template, session.messages())
        assert session.messages()[0] == Message("system", "Be brief.")
        assert session.turns[0].role == "user"
        assert session.turns[-1].content == f"question {number}?"
        session.turns.append(Message("assistant", f"answer {number}."))
    kept = len(session.turns) // 2
    assert kept < 8
    assert session.turns[0].content == f"question {8 - kept}?"  # the oldest went, the rest is in order
    assert [turn.content for turn in session.turns[-2:]] == ["question 7?", "answer 7."]
    # No more was dropped than had to be: the next older pair would not have fitted.
    pair = [Message("user", f"question {7 - kept}?"), Message("assistant", f"answer {7 - kept}.")]
    longer = [session.messages()[0], *pair, *session.turns[:-1]]
    assert len(prompt_ids(template, longer)) > 80


def test_chat_keeps_a_question_that_is_too_long(template: Template) -> None:
    session = ChatSession(template, context_length=40)
    session.turns += [Message("user", "a"), Message("assistant", "b"), Message("user", "x y z " * 30)]
    assert len(session.prompt(room_for_answer=10)) > 40
    assert [turn.content for turn in session.turns] == ["x y z " * 30]


def test_undo_takes_back_the_last_exchange(template: Template) -> None:
    session = ChatSession(template, context_length=500)
    first, second = Message("user", "one"), Message("user", "two")
    session.turns += [first, Message("assistant", "1"), second, Message("assistant", "2")]
    before = session.prompt(10)
    assert session.undo() == second
    assert [turn.content for turn in session.turns] == ["one", "1"]
    session.turns += [second, Message("assistant", "2")]
    assert session.prompt(10) == before
    session.turns.append(Message("user", "unanswered"))
    assert session.undo() == Message("user", "unanswered")
    assert (session.undo(), session.undo(), session.undo()) == (second, first, None)
    assert session.turns == []


def test_exchanges_of_several_turns_are_dropped_whole(template: Template) -> None:
    session = ChatSession(template, context_length=120)
    first = [Message("user", "a" * 40), Message("user", "more"), Message("assistant", "b"), Message("tool", "seen")]
    session.turns += [*first, Message("assistant", "c"), Message("user", "d" * 30), Message("assistant", "e")]
    session.turns.append(Message("user", "f"))
    assert len(session.prompt(room_for_answer=20)) <= 100
    assert [turn.content for turn in session.turns] == ["d" * 30, "e", "f"]


def test_thinking_goes_into_the_next_prompt_as_the_template_has_it() -> None:
    template = make_template(make_tokenizer(THINKING_TEMPLATE), [2])
    session = ChatSession(template, context_length=500)
    session.turns += [Message("user", "q"), Message("assistant", "<think>\nhm\n</think>\n\nA."), Message("user", "r")]
    text = template.tokenizer.decode(session.prompt(10))
    assert "hm" not in text
    assert "<|im_start|>assistant\nA.<|im_end|>" in text


@pytest.mark.parametrize(
    ("opening", "wanted"),
    [("", ""), ("<think>\n", "<think>\n"), ("<think>", "<think>"), ("<think>\n\n</think>\n\n", "")],
    ids=["none", "Qwen3.5", "bare", "switched off"],
)
def test_a_prompt_may_open_the_thinking(opening: str, wanted: str) -> None:
    chat_template = CHATML.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")
    assert opening in chat_template
    session = ChatSession(make_template(make_tokenizer(chat_template), [2]), context_length=500)
    session.turns.append(Message("user", "is <think> a tag?"))
    assert session.opened_thinking(session.prompt(10)) == wanted
