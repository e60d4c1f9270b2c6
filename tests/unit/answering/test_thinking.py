"""Thinking is told from the answer however the text is cut into pieces, and nothing of either is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qingtune.answering.thinking import ThinkingSplitter, split_thinking

# text -> its thinking, its answer, and whether it is still within its thinking at the end
CASES = {
    "Qwen3's form": ("<think>\nHm.\n</think>\n\nYes.", "\nHm.\n", "Yes."),
    "an empty block": ("<think>\n\n</think>\n\nYes.", "\n\n", "Yes."),
    "no block": ("Yes.", "", "Yes."),
    "nothing": ("", "", ""),
    "only space": (" \n", "", " \n"),
    "space before the block": ("\n <think>a</think>b", "a", "b"),
    "space before an answer": ("\n b", "", "\n b"),
    "a block that never closes": ("<think>\na < b", "\na < b", ""),
    "a block cut in its closing tag": ("<think>a</thi", "a</thi", ""),
    "a closed block and no more": ("<think>a</think>\n\n", "a", ""),
    "words before the block": ("Well, <think>a</think>b", "", "Well, <think>a</think>b"),
    "tags later in the answer": ("<think>a</think>The <think> tag.</think>", "a", "The <think> tag.</think>"),
    "a tag within the thinking": ("<think>a <think> b</think>c", "a <think> b", "c"),
    "almost the opening tag": ("<thin ice>", "", "<thin ice>"),
    "half of the opening tag": ("<thi", "", "<thi"),
    "almost the closing tag": ("<think>a</<</thin</think>b", "a</<</thin", "b"),
    "a closing tag alone": ("a</think>b", "", "a</think>b"),
    "line ends within the answer": ("<think>a</think>\n\nb\n\nc\n", "a", "b\n\nc\n"),
}


def split(pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = ThinkingSplitter(opened=opened)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.end()
    assert all(part.text for part in parts)
    assert [part.thinking for part in parts] == sorted((part.thinking for part in parts), reverse=True)
    thinking, answer = ("".join(part.text for part in parts if part.thinking is kind) for kind in (True, False))
    return thinking, answer


@pytest.mark.parametrize(("text", "thinking", "answer"), CASES.values(), ids=CASES)
def test_cases_in_one_piece_in_two_and_in_letters(text: str, thinking: str, answer: str) -> None:
    wanted = (thinking, answer)
    assert split([text]) == split(list(text)) == wanted
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]]) == wanted
    assert split_thinking(text) == (thinking, answer)


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "\n", " ", "a", "龙"])).map("".join)


@given(TEXTS, st.data())
def test_cuts_change_nothing(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for opened in (False, True):
        thinking, answer = split(pieces, opened=opened)
        assert (thinking, answer) == split([text], opened=opened)
        assert text.endswith(answer)
        assert thinking in text
        if opened:
            assert (thinking, answer) == split_thinking("<think>" + text)


def test_parts_come_as_soon_as_they_are_clear() -> None:
    splitter = ThinkingSplitter()
    fed = ["<thi", "nk>", "a", " <", "b", "</think", ">", "\n", "c", "<"]
    parts = [[(part.text, part.thinking) for part in splitter.feed(piece)] for piece in fed]
    assert parts == [
        [], [], [("a", True)], [(" ", True)], [("<b", True)], [], [], [], [("c", False)], [("<", False)]
    ]  # fmt: skip


def test_a_prompt_that_opens_the_block() -> None:
    assert split(["Hm.\n</think>\n\nYes."], opened=True) == ("Hm.\n", "Yes.")
    assert split(["Hm."], opened=True) == ("Hm.", "")
    assert split([], opened=True) == ("", "")
