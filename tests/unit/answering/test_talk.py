"""A chat shows the model what was said, keeps what it answered, and loses nothing when an answer does not come."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_twin import CTRL_C, Script, make_state, talk
from conftest import CHATML, THINKING_TEMPLATE

from qingtune.answering.chat.screen import Screen
from qingtune.answering.chat.talk import Chat
from qingtune.answering.generate import Answer, Decoding
from qingtune.data.format import Message, read_conversations
from qingtune.data.tokenize import prompt_ids

Captured = pytest.CaptureFixture[str]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
ONE_LINE_OF_THOUGHT = "<think>\nHm.\n</think>\n\nYes."


def test_each_prompt_is_that_of_the_turns_and_each_answer_drawn_anew(capsys: Captured) -> None:
    talked = talk(["Bread?", "你好 🥖", "//etc is a folder?"], ["Seven.", "你好！", "Yes."])
    assert capsys.readouterr() == ("Seven.\n你好！\nYes.\n", "")
    assert talked.turns == ["Bread?", "Seven.", "你好 🥖", "你好！", "/etc is a folder?", "Yes."]
    turns, template = talked.state.session.turns, talked.state.session.template
    for place, prompt in zip((1, 3, 5), talked.model.prompts, strict=True):
        assert prompt == template.tokenizer.decode(prompt_ids(template, turns[:place]))
    assert talked.model.decodings == [Decoding(seed=7), Decoding(seed=8), Decoding(seed=9)]


def test_blank_lines_are_no_messages() -> None:
    assert talk(["", "  ", "\n"]).turns == []


def test_bytes_that_are_no_text_are_no_message(capsys: Captured) -> None:
    assert talk(["a\udcff", "Bread?"], ["Seven."]).turns == ["Bread?", "Seven."]
    assert capsys.readouterr().err == "That was not UTF-8 text.\n"


def test_lines_after_exit_are_not_read() -> None:
    assert talk(["/exit", "Bread?"]).script.lines == ["Bread?"]


# --- Answers that break off ------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_answer_so_far(capsys: Captured) -> None:
    before = signal.getsignal(signal.SIGINT)
    talked = talk(["Bread?", "And then?"], [f"At seven{CTRL_C} o'clock.", "Eight."])
    assert capsys.readouterr() == ("At seven\nEight.\n", "[stopped; the answer so far is kept]\n")
    assert talked.turns == ["Bread?", "At seven", "And then?", "Eight."]
    assert "assistant\nAt seven<|im_end|>" in talked.model.prompts[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_pressed_again_and_again_ends_nothing_else(capsys: Captured) -> None:
    state = make_state()
    cleaned_up: list[bool] = []

    def impatient() -> Iterator[int]:
        yield from state.session.template.tokenizer("At", add_special_tokens=False)["input_ids"]
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned_up.append(True)

    assert talk(["Bread?", "Now?"], [impatient(), "Yes."], state=state).turns == ["Bread?", "At", "Now?", "Yes."]
    assert "stopped; the answer so far is kept" in capsys.readouterr().err
    assert cleaned_up


def test_ctrl_c_while_text_is_shown_loses_none_of_it(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Screen.write

    def pressing(screen: Screen, text: str, *, dim: bool = False) -> None:
        signal.raise_signal(signal.SIGINT)
        write(screen, text, dim=dim)

    monkeypatch.setattr(Screen, "write", pressing)
    talked = talk(["Bread?", "/show"], ["Seven."])
    assert talked.turns[1] in "Seven."
    assert capsys.readouterr().out == f"{talked.turns[1]}\n"
    assert len(talked.turns) == 2


def test_ctrl_c_just_before_a_piece_is_given_loses_none_of_it(capsys: Captured) -> None:
    state = make_state()

    class CaughtInBetween(Answer):
        def __iter__(self) -> Iterator[str]:
            self.text = "Seven."
            signal.raise_signal(signal.SIGINT)
            yield self.text

    answer = CaughtInBetween(state.session.template, [])
    Chat(lambda ids, decoding: answer, state, Script(["Bread?"]), Screen(live=False)).talk()
    assert state.session.turns[1].content == "Seven."
    assert capsys.readouterr().out == "Seven.\n"


@pytest.mark.parametrize("reply", [CTRL_C + "Seven.", "<think>\nLet me" + CTRL_C, " \n" + CTRL_C])
def test_without_an_answer_all_is_as_before_and_retry_asks_again(capsys: Captured, reply: str) -> None:
    talked = talk(["Hi.", "Bread?", "/retry"], ["Hello.", reply, "Seven."])
    assert "[stopped; no answer yet; /retry asks again]" in capsys.readouterr().err
    assert talked.turns == ["Hi.", "Hello.", "Bread?", "Seven."]
    assert talked.model.prompts[1] == talked.model.prompts[2]
    assert talked.model.decodings[1] != talked.model.decodings[2]


def test_a_question_without_an_answer_does_not_stay(capsys: Captured) -> None:
    talked = talk(["Hi.", "Bread?", "/undo", "/retry"], ["Hello.", CTRL_C])
    assert talked.turns == []
    assert capsys.readouterr().err.endswith("[taken back]\n[nothing to retry]\n")


def test_an_empty_answer_is_told(capsys: Captured) -> None:
    assert talk(["Bread?"], [""]).turns == []
    assert capsys.readouterr() == ("", "[the model ended its turn; no answer yet; /retry asks again]\n")


def test_retry_puts_the_question_again_and_draws_otherwise(capsys: Captured) -> None:
    talked = talk(["/retry", "Hi.", "Bread?", "/retry"], ["Hello.", "Seven.", "Eight."])
    assert talked.turns == ["Hi.", "Hello.", "Bread?", "Eight."]
    assert talked.model.prompts[1] == talked.model.prompts[2]
    assert [decoding.seed for decoding in talked.model.decodings] == [7, 8, 9]
    assert capsys.readouterr().err == "[nothing to retry]\n"


def test_a_retry_that_brings_nothing_leaves_the_earlier_answer(capsys: Captured) -> None:
    talked = talk(["Bread?", "/retry", "/retry"], ["Seven.", CTRL_C, "Eight."])
    assert "[stopped; no new answer; the earlier one is kept]" in capsys.readouterr().err
    assert talked.turns == ["Bread?", "Eight."]
    assert talked.model.prompts[0] == talked.model.prompts[2]


def test_retry_without_drawing_says_that_the_answer_will_be_the_same(capsys: Captured) -> None:
    talk(["/set temperature 0", "Bread?", "/retry"], ["Seven.", "Seven."])
    assert "[temperature is 0: the same prompt gives the same answer]" in capsys.readouterr().err


def test_an_answer_that_is_cut_says_so(capsys: Captured) -> None:
    state = make_state()
    ids = state.session.template.tokenizer("Fresh bread", add_special_tokens=False)["input_ids"]
    talk([f"/set max_new_tokens {len(ids)}", "Bread?"], [ids], state=state)
    assert "[cut at max_new_tokens (change it with /set); the answer so far is kept]" in capsys.readouterr().err
    talk(["/set max_new_tokens 99", "Bread?"], [ids], state=state)
    assert "[the context is full; the answer so far is kept]" in capsys.readouterr().err
    assert state.session.turns[-1].content == "Fresh bread"


def test_memory_that_runs_out_does_not_end_the_chat(capsys: Captured) -> None:
    state = make_state()

    def large(error: Exception) -> Iterator[int]:
        yield from state.session.template.tokenizer("At", add_special_tokens=False)["input_ids"]
        raise error

    talked = talk(["Bread?", "Now?"], [large(MemoryError()), "Yes."], state=state)
    assert "[out of memory; the answer so far is kept]" in capsys.readouterr().err
    assert talked.turns == ["Bread?", "At", "Now?", "Yes."]
    with pytest.raises(RuntimeError, match="a fault of ours"):
        talk(["Bread?"], [large(RuntimeError("a fault of ours"))], state=state)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_between_answers_ends_nothing(capsys: Captured) -> None:
    talked = talk([lambda: signal.raise_signal(signal.SIGINT), "Bread?"], ["Seven."])
    assert talked.turns == ["Bread?", "Seven."]
    assert capsys.readouterr().err == "[stopped]\n"


# --- What the context holds ------------------------------------------------------------------------------------------


def test_dropped_turns_are_told(capsys: Captured) -> None:
    state = make_state(context_length=120)
    lines = ["/set max_new_tokens 40", *(f"question {number}?" for number in range(4))]
    talked = talk(lines, [f"answer {number}." for number in range(4)], state=state)
    assert "[the context is full: the 2 oldest turns were dropped]" in capsys.readouterr().err
    assert talked.turns[0] != "question 0?"
    assert talked.turns[-2:] == ["question 3?", "answer 3."]


def test_turns_dropped_for_an_answer_that_did_not_come_are_back() -> None:
    state = make_state(context_length=120)
    lines = ["/set max_new_tokens 40", *(f"question {number}?" for number in range(4))]
    replies = [f"answer {number}." for number in range(4)]
    kept = talk(lines, replies, state=state).turns
    assert talk(["question 4?"], [CTRL_C], state=state).turns == kept


def test_a_question_that_does_not_fit_is_told_and_nothing_lost(capsys: Captured) -> None:
    state = make_state(context_length=120)
    talked = talk(["Bread?", "long " * 100, "Now?"], ["Seven.", "Yes."], state=state)
    assert "tokens, but the model's context is 120. Shorten it." in capsys.readouterr().err
    assert talked.turns == ["Bread?", "Seven.", "Now?", "Yes."]


def test_a_template_that_refuses_is_told_and_nothing_lost(capsys: Captured) -> None:
    state = make_state(NO_SYSTEM)
    talked = talk(["Bread?", "/system Be brief.", "Now?", "/system default", "/retry"], ["Seven.", "Yes."], state=state)
    assert "the model's chat template refuses this: no system role" in capsys.readouterr().err
    assert talked.turns == ["Bread?", "Seven.", "Now?", "Yes."]


# --- Thinking --------------------------------------------------------------------------------------------------------


def test_thinking_is_folded_on_a_pipe_and_kept_for_the_template(capsys: Captured) -> None:
    talked = talk(["Bread?", "Sure?"], [ONE_LINE_OF_THOUGHT, "Sure."], state=make_state(THINKING_TEMPLATE))
    assert capsys.readouterr() == ("Yes.\nSure.\n", "")
    assert talked.turns == ["Bread?", ONE_LINE_OF_THOUGHT, "Sure?", "Sure."]
    assert "assistant\nYes.<|im_end|>" in talked.model.prompts[1]


def test_thinking_that_the_prompt_opens(capsys: Captured) -> None:
    state = make_state(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    talked = talk(["Bread?"], ["Hm.\n</think>\n\nYes."], state=state)
    assert capsys.readouterr() == ("Yes.\n", "")
    assert talked.turns == ["Bread?", "<think>\nHm.\n</think>\n\nYes."]


def test_thinking_shown_on_a_pipe_stands_between_its_tags(capsys: Captured) -> None:
    lines = ["/set thinking show", "Bread?", "Now?", "Sure?"]
    talk(lines, [ONE_LINE_OF_THOUGHT, "<think>\n\n</think>\n\nNo.", "Sure."])
    assert capsys.readouterr().out == "<think>Hm.\n</think>\n\nYes.\nNo.\nSure.\n"


def test_thinking_counts_on_a_terminal(capsys: Captured) -> None:
    talk(["Bread?", "Now?", "Sure?"], ["<think>ab</think>Yes.", "<think></think>No.", "Sure."], live=True)
    shown = "\r\x1b[K\x1b[2mthinking… {} characters\x1b[0m"
    assert capsys.readouterr().out == shown.format(1) + shown.format(2) + "\nYes.\nNo.\nSure.\n"


def test_thinking_shown_on_a_terminal_is_dim(capsys: Captured) -> None:
    talk(["/set thinking show", "Bread?"], ["<think>\na</think>Yes."], live=True)
    assert capsys.readouterr().out == "\x1b[2ma\x1b[0m\n\nYes.\n"


def test_thinking_cut_off_is_told(capsys: Captured) -> None:
    state = make_state()
    ids = state.session.template.tokenizer("<think>\nHm, let me", add_special_tokens=False)["input_ids"]
    assert talk([f"/set max_new_tokens {len(ids)}", "Bread?"], [ids], state=state).turns == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[cut at max_new_tokens (change it with /set); no answer yet; /retry asks again]" in captured.err


# --- The screen ------------------------------------------------------------------------------------------------------


def test_no_text_of_a_model_steers_the_terminal(capsys: Captured) -> None:
    trick = "a\x1b[2J\x07b\r\nc\td\x9b1m"
    talk(["Bread?"], [trick], live=True)
    assert capsys.readouterr().out == "a\\x1b[2J\\x07b\nc\td\\x9b1m\n"
    talk(["Bread?"], [trick])
    assert capsys.readouterr().out == trick + "\n"


def test_speed_is_told_on_request(capsys: Captured) -> None:
    talk(["/set stats on", "Bread?", "/set stats off", "Now?"], ["Fresh bread", "Yes."])
    err = capsys.readouterr().err
    assert err.count("tokens in, first text after ") == 1
    assert " s; " in err
    assert " tokens/s]\n" in err


def test_what_is_typed_is_recorded_unless_told_not_to() -> None:
    script = talk(["/set history off", "/help", "/set history on"]).script
    assert script.recorded == [True, False, False, True]


def test_a_partial_answer_can_be_saved_and_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    talk(["Bread?", f"/save {path}"], [f"At seven{CTRL_C}"])
    (conversation,) = read_conversations([str(path)], None, "raise").conversations
    assert conversation.messages == (Message("user", "Bread?"), Message("assistant", "At seven"))
