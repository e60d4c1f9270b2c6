"""Files of prompts: rows of any format, answered or not, give the prompt that training would have shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qingtune.data.format import prompt_of, read_conversations
from qingtune.data.prompts import rows_with_prompts
from qingtune.errors import UserError

SYSTEM = {"role": "system", "content": "s"}
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "q", "input": "店名：蓝门", "output": "a"},
    "instruction with all": {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"]]},
    "instruction with text": {"instruction": "q", "input": "", "output": "a", "text": "### q\n### a"},
    "messages": {"messages": [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "completion": {"prompt": "q", "completion": "a"},
    "completion of turns": {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
}
UNANSWERED: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "q", "input": "店名：蓝门"},
    "instruction with all": {**ROWS["instruction with all"], "output": None},
    "instruction with text": {**ROWS["instruction with text"], "output": ""},
    "messages": {"messages": ROWS["messages"]["messages"][:-1]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
    "completion": {"prompt": "q"},
    "completion of turns": {"prompt": [SYSTEM, ASKED]},
}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Reads the prompts of rows from a file `p.jsonl`."""
    monkeypatch.chdir(tmp_path)

    def read_prompts(*rows: Any) -> list[Any]:
        Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return list(rows_with_prompts("p.jsonl"))

    return read_prompts


@pytest.mark.parametrize("kind", ROWS)
def test_prompt_is_that_of_training_whether_or_not_there_is_an_answer(
    prompts: Callable[..., list[Any]], kind: str
) -> None:
    ((values, prompt),) = prompts(ROWS[kind])
    assert values == ROWS[kind]
    assert prompt == prompt_of(read_conversations(["p.jsonl"], None, "raise").conversations[0])
    assert prompts(UNANSWERED[kind]) == [(UNANSWERED[kind], prompt)]


def test_text_rows_are_their_own_prompt(prompts: Callable[..., list[Any]]) -> None:
    assert prompts({"text": "从前"}) == [({"text": "从前"}, "从前")]


def test_rows_keep_their_order_and_other_columns(prompts: Callable[..., list[Any]]) -> None:
    rows = [{"prompt": str(number), "id": number, "tags": ["x"]} for number in range(3)]
    found = prompts(*rows)
    assert [values for values, _ in found] == rows
    assert [prompt[0].content for _, prompt in found] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 1}, '"prompt" is missing'),
        ({"prompt": None}, '"prompt" is missing'),
        ({"prompt": ""}, '"prompt" is empty'),
        ({"prompt": 5}, '"prompt" is int'),
        ({"prompt": "\ud800"}, '"prompt" contains half of a surrogate pair'),
        ({"instruction": ""}, '"instruction" is empty'),
        ({"instruction": "q", "history": 5}, '"history" is not a list'),
        ({"text": None}, '"text" is missing'),
        ({"messages": []}, '"messages" is not a list of turns'),
        ({"messages": [ANSWERED]}, "no "),
        ({"messages": [SYSTEM]}, "no "),
        ({"conversations": "q"}, '"conversations" is not a list of turns'),
        (["q"], "expected a JSON object, not a list"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_row_without_a_prompt_is_an_error(prompts: Callable[..., list[Any]], row: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        prompts({"prompt": "q"}, row)
    assert str(caught.value).startswith(f"p.jsonl:2: {reason}")
