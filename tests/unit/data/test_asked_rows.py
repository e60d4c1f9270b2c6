"""Rows to evaluate on: of every form of training, with an answer and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from qingtune.data.format import FileFacts, Message, conversations_of
from qingtune.data.prompts import EvaluationRow, asked_rows
from qingtune.data.read import Fault

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKING = (Message("user", "q"),)


def read(tmp_path: Path, row: dict[str, Any], system_prompt: str | None = None) -> EvaluationRow | Fault:
    (found,) = asked_rows(str(write_jsonl(tmp_path / "rows.jsonl", [row])), system_prompt)
    return found


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"instruction": "q", "output": "a", "form": {"tags": 1}}, "a"),
        ({"instruction": "q", "output": None}, None),
        ({"instruction": "q"}, None),
        ({"prompt": "q", "completion": "a"}, "a"),
        ({"prompt": "q", "completion": None}, None),
        ({"prompt": "q"}, None),
        ({"prompt": [USER]}, None),
        ({"messages": [USER, ANSWER]}, "a"),
        ({"messages": [USER]}, None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "a"),
        ({"conversations": [{"from": "human", "value": "q"}]}, None),
    ],
)
@pytest.mark.parametrize("system_prompt", [None, "s"])
def test_prompt_and_reference(
    tmp_path: Path, row: dict[str, Any], reference: str | None, system_prompt: str | None
) -> None:
    found = read(tmp_path, row, system_prompt)
    assert isinstance(found, EvaluationRow)
    assert found.prompt == (*([Message("system", "s")] if system_prompt else []), *ASKING)
    assert found.reference == reference
    assert (found.conversation is None) == (reference is None)
    assert found.values == row


def test_plain_text_asks_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, {"text": "once upon a time"})
    assert isinstance(found, EvaluationRow)
    assert (found.prompt, found.reference) == (None, None)
    assert found.conversation is not None
    assert found.conversation.text == "once upon a time"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": ""}, '"output" is empty'),
        ({"prompt": ""}, '"prompt" is empty'),
        ({"messages": [ANSWER]}, "an assistant turn without a user turn before it"),
        ({"messages": []}, '"messages" is not a list of turns'),
        ({"messages": [{"role": "system", "content": "s"}]}, "no user turn, so there is nothing to answer"),
        ({"question": "q"}, '"prompt" is missing'),
    ],
)
def test_faulty_rows_are_faults(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found = read(tmp_path, row)
    assert isinstance(found, Fault)
    assert found.reason == reason
    assert found.origin.endswith("rows.jsonl:1")


def test_rules_of_form_are_no_column_that_is_ignored(tmp_path: Path) -> None:
    about = FileFacts()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a", "form": {"tags": 1}, "id": 7}])
    assert len(list(conversations_of(str(path), None, about))) == 1
    assert about.ignored_columns == {"id": 1}
