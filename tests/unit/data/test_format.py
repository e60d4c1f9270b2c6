"""Rows -> conversations: each format, each fault's reason, and what happens to files with faulty rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from qingtune.data.faults import SHOWN_FAULTS
from qingtune.data.format import FORMATS, Reading, prompt_of, read_conversations
from qingtune.errors import UserError

Turns = list[tuple[str, str]]
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "instruction": {"instruction": "q", "output": "a"},
    "completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "t"},
}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reading]:
    """Reads rows from a file `t.jsonl`."""
    monkeypatch.chdir(tmp_path)

    def read_rows(*rows: Any, system_prompt: str | None = None, on_bad_row: str = "raise") -> Reading:
        # Escaped, as half a surrogate pair can be written in no other way.
        Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_conversations(["t.jsonl"], system_prompt, on_bad_row)

    return read_rows


def turns(reading: Reading) -> list[Turns]:
    return [[(message.role, message.content) for message in c.messages] for c in reading.conversations]


# --- Formats ---------------------------------------------------------------------------------------------------------

QA = [("user", "q"), ("assistant", "a")]
ROLES = {"system": "s", "user": "q", "assistant": "a"}


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (GOOD["instruction"], "instruction", QA),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction", QA),
        ({"instruction": "q", "input": None, "output": "a", "system": None, "history": None}, "instruction", QA),
        (
            {"instruction": "q", "input": "店名：蓝门", "output": "a"},
            "instruction",
            [("user", "q\n\n店名：蓝门"), QA[1]],
        ),
        ({"instruction": " q ", "output": "\n a\n"}, "instruction", [("user", " q "), ("assistant", "\n a\n")]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
            "instruction",
            [
                ("system", "s"),
                ("user", "q1"),
                ("assistant", "a1"),
                ("user", "q2"),
                ("assistant", "a2"),
                *QA,
            ],
        ),
        (GOOD["messages"], "messages", QA),
        (
            {"messages": [{"role": role, "content": text} for role, text in ROLES.items()] + [ASKED, ANSWERED]},
            "messages",
            [*ROLES.items(), *QA],
        ),
        (
            {"messages": [ASKED, ANSWERED, {"role": "tool", "content": "12"}, ANSWERED]},
            "messages",
            [*QA, ("tool", "12"), QA[1]],
        ),
        (GOOD["sharegpt"], "sharegpt", QA),
        ({"conversations": [ASKED, ANSWERED]}, "sharegpt", QA),
        ({**GOOD["sharegpt"], "system": "s"}, "sharegpt", [("system", "s"), *QA]),
        (
            {"conversations": [{"from": "system", "value": "s"}, *GOOD["sharegpt"]["conversations"]]},
            "sharegpt",
            [("system", "s"), *QA],
        ),
        (GOOD["completion"], "completion", QA),
        ({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}, "completion", [*QA, *QA]),
    ],
    ids=repr,
)
def test_rows_become_conversations(
    read: Callable[..., Reading], row: dict[str, Any], kind: str, expected: Turns
) -> None:
    reading = read(row)
    assert turns(reading) == [expected]
    assert reading.files["t.jsonl"].format == kind
    assert reading.conversations[0].origin == "t.jsonl:1"
    assert [(m.role, m.content) for m in prompt_of(reading.conversations[0])] == expected[:-1]


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("user", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant")],
)
def test_sharegpt_names_of_roles(read: Callable[..., Reading], name: str, role: str) -> None:
    given = {"user": "human", "assistant": "gpt"} | {role: name}
    row = {"conversations": [{"from": given["user"], "value": "q"}, {"from": given["assistant"], "value": "a"}]}
    assert turns(read(row)) == [QA]


def test_text_rows_have_no_turns(read: Callable[..., Reading]) -> None:
    reading = read({"text": "只是文字\n"}, system_prompt="s")
    assert [(c.text, c.messages) for c in reading.conversations] == [("只是文字\n", ())]


@pytest.mark.parametrize("kind", ["instruction", "messages", "sharegpt", "completion"])
def test_system_prompt_is_put_only_where_there_is_none(read: Callable[..., Reading], kind: str) -> None:
    mine = {
        "instruction": {**GOOD["instruction"], "system": "mine"},
        "messages": {"messages": [{"role": "system", "content": "mine"}, ASKED, ANSWERED]},
        "sharegpt": {**GOOD["sharegpt"], "system": "mine"},
        "completion": {"prompt": [{"role": "system", "content": "mine"}, ASKED], "completion": [ANSWERED]},
    }[kind]
    given = [[("system", "given"), *QA], [("system", "mine"), *QA]]
    assert turns(read(GOOD[kind], mine, system_prompt="given")) == given
    assert turns(read(GOOD[kind], mine)) == [QA, given[1]]


def test_columns_that_are_not_used_are_named(read: Callable[..., Reading]) -> None:
    reading = read({**GOOD["instruction"], "text": "t", "id": 1, "input": ""})
    assert reading.files["t.jsonl"].ignored_columns == {"id": 1, "text": 1}


def test_each_file_has_a_format_of_its_own(tmp_path: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{kind}.jsonl", [row])) for kind, row in GOOD.items()]
    reading = read_conversations(paths, None, "raise")
    assert [about.format for about in reading.files.values()] == list(GOOD) == list(FORMATS)
    assert reading.rows == len(reading.conversations) == len(GOOD)


# --- Faults ----------------------------------------------------------------------------------------------------------


def say(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": None}, '"output" is missing'),
        ({"instruction": "q"}, '"output" is missing'),
        ({"instruction": 5, "output": "a"}, '"instruction" is int, not text'),
        ({"instruction": "q", "output": ["a"]}, '"output" is list, not text'),
        ({"instruction": "q", "output": "a", "input": 5}, '"input" is int, not text'),
        ({"instruction": "q", "output": "a", "system": ["s"]}, '"system" is list, not text'),
        ({"instruction": "q", "output": ""}, '"output" is empty'),
        ({"instruction": "q", "output": " \n\t"}, '"output" is empty'),
        ({"instruction": "", "output": "a"}, '"instruction" is empty'),
        ({"instruction": "q", "output": "a\ud83d"}, '"output" contains half of a surrogate pair'),
        ({"instruction": "q\udc00", "output": "a"}, '"instruction" contains half of a surrogate pair'),
        ({"instruction": "q", "output": "a", "history": "none"}, '"history" is not a list of'),
        ({"instruction": "q", "output": "a", "history": 5}, '"history" is not a list of'),
        ({"instruction": "q", "output": "a", "history": [["q1"]]}, '"history" is not a list of'),
        ({"instruction": "q", "output": "a", "history": [["q1", None]]}, '"history" is not a list of'),
        ({"instruction": "q", "output": "a", "history": [["q1", ""]]}, '"history"'),
        ({"instruction": "q", "output": "a", "history": [["q1", "a\ud83d"]]}, '"history"'),
        ({"messages": "q"}, '"messages" is not a list of turns'),
        ({"messages": []}, '"messages" is not a list of turns'),
        ({"messages": ["q", "a"]}, 'turn 1 of "messages" is not an object'),
        ({"messages": [ASKED, {"role": "narrator", "content": "a"}]}, "turn 2 has the unknown role 'narrator'"),
        ({"messages": [ASKED, {"content": "a"}]}, "turn 2 has the unknown role None"),
        ({"messages": [ASKED, {"role": "assistant"}]}, 'turn 2: "content" is missing'),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, 'turn 2: "content" is empty'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWERED]}, 'turn 1: "content" is list'),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]},
            'turn 2: "content" contains half of a surr',
        ),
        (
            {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"id": "1"}]}]},
            "tool-calling data is not supported (turn 2: ",
        ),
        (say("user"), "no assistant turn"),
        (say("system", "user"), "no assistant turn"),
        (say("assistant"), "an assistant turn without a user turn before it"),
        (say("system", "assistant"), "an assistant turn without a user turn before it"),
        (say("user", "assistant", "assistant"), "an assistant turn without a user turn before it"),
        (say("user", "assistant", "user"), "the last turn is not an assistant turn"),
        (say("user", "system", "assistant"), "a system message that is not the first"),
        ({**GOOD["sharegpt"], "system": 5}, '"system" is int, not text'),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, 'turn 2: "value" is missing'),
        ({"conversations": {"from": "human"}}, '"conversations" is not a list of turns'),
        ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
        ({"prompt": "q", "completion": 1}, '"completion" is int, not text'),
        ({"prompt": "q", "completion": [ANSWERED]}, '"prompt" is not a list of turns'),
        ({"text": ""}, '"text" is empty'),
        ({"text": {"a": 1}}, '"text" is dict, not text'),
        ({"messages": None}, '"messages" is missing'),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_fault_says_why_and_where(read: Callable[..., Reading], row: dict[str, Any], reason: str) -> None:
    kind = next(kind for kind, form in FORMATS.items() if form.needed[0] in row)
    reading = read(GOOD[kind], row, GOOD[kind], on_bad_row="skip")
    (fault,) = reading.faults
    assert fault.origin == "t.jsonl:2"
    assert fault.reason.startswith(reason)
    assert [c.origin for c in reading.conversations] == ["t.jsonl:1", "t.jsonl:3"]


@pytest.mark.parametrize("kind", FORMATS)
def test_row_without_the_columns_of_its_file_is_a_fault(read: Callable[..., Reading], kind: str) -> None:
    for rows in ([GOOD[kind], {"other": 1}], [{"other": 1}, GOOD[kind]]):
        reading = read(*rows, on_bad_row="skip")
        (fault,) = reading.faults
        assert fault.origin == f"t.jsonl:{1 + rows.index({'other': 1})}"
        assert fault.reason == f'"{FORMATS[kind].needed[0]}" is missing'
        assert len(reading.conversations) == 1


def test_format_is_found_though_the_first_rows_are_faulty(read: Callable[..., Reading]) -> None:
    rows = [["no object"], {"instruction": "no output"}, {"x": 1}, GOOD["instruction"], {"instruction": "again none"}]
    reading = read(*rows, on_bad_row="skip")
    assert reading.files["t.jsonl"].format == "instruction"
    assert [fault.origin for fault in reading.faults] == ["t.jsonl:1", "t.jsonl:2", "t.jsonl:3", "t.jsonl:5"]
    assert turns(reading) == [QA]


def test_no_known_format_names_the_columns_there_are(read: Callable[..., Reading]) -> None:
    with pytest.raises(UserError) as caught:
        read({"question": "q", "answer": "a"}, on_bad_row="skip")
    assert str(caught.value).startswith(
        't.jsonl:1: the columns ("question", "answer") match no known format. The known formats are'
    )
    for form in FORMATS.values():
        assert " + ".join(form.needed) in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        (("question", "answer"), 'Rename "question" to "instruction" and "answer" to "output"'),
        (("response", "instruction"), 'Rename "response" to "output"'),
        (("question", "topic"), "Rename the keys"),
    ],
)
def test_no_known_format_names_the_keys_to_rename(
    columns: tuple[str, ...], fix: str, read: Callable[..., Reading]
) -> None:
    with pytest.raises(UserError) as caught:
        read(dict.fromkeys(columns, "x"))
    assert str(caught.value).endswith(f" {fix}, or see docs/data.md.")


def test_raise_lists_the_first_faults_and_counts_all(read: Callable[..., Reading]) -> None:
    bad = {"instruction": "q", "output": ""}
    with pytest.raises(UserError) as caught:
        read(GOOD["instruction"], *[bad] * 1_200)
    *listed, more, fix = str(caught.value).splitlines()
    assert listed == [f't.jsonl:{line}: "output" is empty' for line in range(2, 2 + SHOWN_FAULTS)]
    assert more == f"... and {1_200 - SHOWN_FAULTS:,} more"
    assert fix == "(1,200 of 1,201 rows.) Fix the rows or pass --on_bad_row skip."


def test_raise_counts_over_all_files(tmp_path: Path) -> None:
    paths = [str(write_jsonl(tmp_path / f"{n}.jsonl", [GOOD["text"], {"text": ""}])) for n in range(2)]
    with pytest.raises(UserError) as caught:
        read_conversations(paths, None, "raise")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[:2]] == [f"{path}:2" for path in paths]
    assert "(2 of 4 rows.)" in str(caught.value)


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_no_usable_row_is_an_error(read: Callable[..., Reading], on_bad_row: str) -> None:
    with pytest.raises(UserError, match=r"t.jsonl: no usable row \(0 read, 0 refused\)"):
        read(on_bad_row=on_bad_row)
    with pytest.raises(UserError, match='"output" is empty') as caught:
        read(*[{"instruction": "q", "output": ""}] * 3, on_bad_row=on_bad_row)
    assert ("no usable row (3 read, 3 refused)" in str(caught.value)) == (on_bad_row == "skip")
