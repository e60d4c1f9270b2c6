"""Data of other kinds, as the demonstration sets of other tools have it, is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import foreign_rows as foreign
import pytest
from conftest import make_tokenizer, reporting, write_jsonl

from qingtune.cli import main
from qingtune.config.training import TrainConfig
from qingtune.data import fields
from qingtune.data.fields import FIELDS, is_empty, lost_meaning
from qingtune.data.format import Reading, prompt_of, read_conversations
from qingtune.data.placeholders import first_placeholder
from qingtune.data.prepare import Data, load_data
from qingtune.data.prompts import asked_rows, rows_with_prompts
from qingtune.data.read import Fault
from qingtune.data.rules import USUAL, Rules
from qingtune.data.tokenize import make_template
from qingtune.errors import UserError

REFUSED: dict[str, tuple[foreign.Rows, str, str]] = {
    "ShareGPT with tools": (foreign.SHAREGPT_TOOLS, fields.TOOLS, '"tools"'),
    "ShareGPT with tools, no call": (foreign.SHAREGPT_TOOLS_UNCALLED, fields.TOOLS, '"tools"'),
    "OpenAI with tools": (foreign.OPENAI_TOOLS, fields.TOOLS, '"tools"'),
    "DPO as Alpaca": (foreign.DPO_ALPACA, fields.PREFERENCE, '"chosen", "rejected"'),
    "DPO as ShareGPT": (foreign.DPO_SHAREGPT, fields.PREFERENCE, '"chosen", "rejected"'),
    "DPO of messages": (foreign.DPO_MESSAGES, fields.PREFERENCE, '"chosen", "rejected"'),
    "DPO with prompt": (foreign.DPO_PROMPT, fields.PREFERENCE, '"chosen", "rejected"'),
    "DPO as OpenAI": (foreign.DPO_OPENAI, fields.PREFERENCE, '"preferred_output", "non_preferred_output"'),
    "KTO of messages": (foreign.KTO_MESSAGES, fields.LABELLED, '"label"'),
    "KTO of completions": (foreign.KTO_COMPLETION, fields.LABELLED, '"label"'),
    "images": (foreign.IMAGES_SHAREGPT, fields.MULTIMODAL, '"images"'),
    "images as parts": (foreign.IMAGES_OPENAI, fields.MULTIMODAL, 'turn 1: a part of type "image_url"'),
    "audio": (foreign.AUDIO, fields.MULTIMODAL, '"audios"'),
    "video": (foreign.VIDEO, fields.MULTIMODAL, '"video"'),
    "weights": (foreign.WEIGHTS, fields.WEIGHTED, 'turn 2: "weight"'),
    "loss false": (foreign.NOT_TRAINED, fields.WEIGHTED, 'turn 2: "loss"'),
    "reasoning": (foreign.REASONING, fields.REASONING, 'turn 2: "reasoning_content"'),
    "classification": (foreign.CLASSIFICATION, fields.CLASSIFICATION, '"label"'),
    "embeddings": (foreign.EMBEDDINGS, fields.EMBEDDING, '"query", "pos"'),
    "prompts": (foreign.PROMPTS, fields.PROMPTS, '"prompt", "ground_truth"'),
    "token ids": (foreign.TOKENISED, fields.TOKENISED, '"input_ids"'),
    "a turn in each row": (foreign.TURN_A_ROW, fields.TURNS, '"role"'),
    "answers known to be wrong": (foreign.WRONG_ANSWERS, fields.LABELLED, '"is_correct"'),
    "attachments": (foreign.ATTACHMENTS, fields.MULTIMODAL, 'turn 1: "attachments"'),
    "rationale": (foreign.RATIONALE, fields.REASONING, '"rationale"'),
    "context": (foreign.CONTEXT, fields.PROMPT_PART, '"context"'),
}
TRAINED: dict[str, foreign.Rows] = {
    "Alpaca": foreign.ALPACA,
    "Alpaca with history": foreign.ALPACA_WITH_HISTORY,
    "ShareGPT with an empty list of tools": foreign.SHAREGPT_NO_TOOLS,
    "placeholders": foreign.IDENTITY,
    "weights of 1": foreign.NEUTRAL_WEIGHTS,
    "topics": foreign.TOPICS,
    "texts by professions": [{"text": "I bake at four.", "role": "baker"}],
}
GOOD = {"instruction": "q", "output": "a"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(rows: foreign.Rows, on_bad_row: str = "raise", rules: Rules = USUAL) -> Reading:
    write_jsonl(Path("t.jsonl"), rows)
    return read_conversations(["t.jsonl"], None, on_bad_row, rules)


def check(rows: foreign.Rows, *flags: str) -> dict[str, Any]:
    """The report of `qingtune check`, as JSON."""
    write_jsonl(Path("t.jsonl"), rows)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["check", "--data", "t.jsonl", "--json_report", *flags])
    return json.loads(out.getvalue())["Training data"]


def prepare(rows: foreign.Rows, **settings: Any) -> tuple[Data, list[str]]:
    """What training makes of rows, and the lines it shows."""
    write_jsonl(Path("t.jsonl"), rows)
    config = TrainConfig.model_validate({"data_path": "t.jsonl", **settings})
    with reporting() as lines:
        return load_data(config, make_template(make_tokenizer(), [2]), None), lines


# --- Kinds of data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "kind", "sign"), REFUSED.values(), ids=REFUSED)
def test_a_file_of_another_kind_is_refused_in_one_line_that_names_it(rows: foreign.Rows, kind: str, sign: str) -> None:
    with pytest.raises(UserError) as caught:
        read(rows)
    first, last = str(caught.value).splitlines()
    assert first == f"t.jsonl:1: {kind} is not supported ({sign}) (and {len(rows) - 1} more rows)"
    assert last.startswith(f"({len(rows)} of {len(rows)} rows.) Fix the rows or pass --on_bad_row skip.")
    with pytest.raises(UserError, match=r"no usable row \(4 read, 4 refused\)") as caught:
        read(rows, "skip")
    assert str(caught.value).splitlines()[1:] == [first]


@pytest.mark.parametrize(("rows", "kind", "sign"), REFUSED.values(), ids=REFUSED)
def test_check_counts_rows_of_another_kind_as_faults(rows: foreign.Rows, kind: str, sign: str) -> None:
    report = check(rows)
    assert report["faults"]["count"] == report["faulty"] == len(rows)
    assert report["reasons"] == {kind: len(rows)}
    assert report["kinds"] == {kind: {"count": 4, "first": [f"t.jsonl:{n} ({sign})" for n in range(1, 5)]}}
    assert report["used"] == 0


@pytest.mark.parametrize(("rows", "kind", "sign"), REFUSED.values(), ids=REFUSED)
def test_skip_leaves_only_rows_that_lose_nothing(rows: foreign.Rows, kind: str, sign: str) -> None:
    columns = {"messages", "conversations", "prompt", "text", "context"} & set(rows[0])
    good = {
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "prompt": {"prompt": "q", "completion": "a"},
        "text": {"text": "t"},
    }.get(next(iter(columns), ""), GOOD)
    reading = read([good, *rows, good], "skip")
    assert [row.origin for row in reading.conversations] == ["t.jsonl:1", f"t.jsonl:{len(rows) + 2}"]
    assert {fault.kind for fault in reading.faults} <= {kind, ""}


@pytest.mark.parametrize("rows", TRAINED.values(), ids=TRAINED)
def test_rows_whose_fields_ask_for_nothing_are_trained(rows: foreign.Rows) -> None:
    assert len(read(rows).conversations) == len(rows)
    report = check(rows)
    assert (report["faults"]["count"], report["used"]) == (0, len(rows))
    assert len(prepare(rows)[0].train) == len(rows)


def test_history_is_a_part_of_the_prompt() -> None:
    asked = prompt_of(read(foreign.ALPACA_WITH_HISTORY).conversations[0])
    assert [message.role for message in asked] == ["user", "assistant", "user", "assistant", "user"]
    assert [message.content for message in asked][:2] == ["早上好", "早上好，想去哪里？"]


@pytest.mark.parametrize("kind", ["messages", "completion", "completion of turns"])
def test_a_system_column_is_read_in_every_form_of_chat(kind: str) -> None:
    turns = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    row: dict[str, Any] = {
        "messages": {"messages": [*turns[0], *turns[1]]},
        "completion": {"prompt": "q", "completion": "a"},
        "completion of turns": {"prompt": turns[0], "completion": turns[1]},
    }[kind]
    (conversation,) = read([{**row, "system": "s"}]).conversations
    assert [(message.role, message.content) for message in conversation.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [foreign.IMAGES_SHAREGPT, foreign.SHAREGPT_TOOLS_UNCALLED], ids=["images", "tools"])
def test_prompts_of_which_a_part_would_be_lost_are_refused(rows: foreign.Rows) -> None:
    path = str(write_jsonl(Path("p.jsonl"), rows))
    with pytest.raises(UserError, match="is not supported"):
        list(rows_with_prompts(path))
    assert all(isinstance(row, Fault) for row in asked_rows(path, None))


@pytest.mark.parametrize("rows", [foreign.DPO_PROMPT, foreign.KTO_COMPLETION, foreign.WEIGHTS], ids=str)
def test_prompts_do_not_depend_on_what_concerns_the_answer(rows: foreign.Rows) -> None:
    path = str(write_jsonl(Path("p.jsonl"), rows))
    assert [values for values, _ in rows_with_prompts(path)] == rows


# --- Fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("empty", [None, "", " ", [], {}, "[]", "null", [None], [""], float("nan")], ids=repr)
def test_a_field_that_holds_nothing_is_harmless(name: str, empty: object) -> None:
    assert lost_meaning({**GOOD, name: empty}, GOOD) is None
    assert is_empty(empty)


@pytest.mark.parametrize(
    ("name", "neutral", "meant"),
    [
        ("weight", [1, 1.0, "1", True], [0, 0.5, "0", 2]),
        ("loss", [True, "true"], [False, "False", 0]),
        ("train", [True], [False]),
        ("masked", [False, 0], [True, 1]),
        ("prefix", [False], [True]),
        ("label", ["travel", "A", 7], [True, False, "true", "False", 1, 0]),
        ("Images", [[]], [["a.jpg"], "a.jpg"]),
        ("tools", [[]], [[{"name": "f"}], '[{"name": "f"}]']),
    ],
)
def test_only_values_that_ask_for_something_are_refused(name: str, neutral: list[Any], meant: list[Any]) -> None:
    assert [lost_meaning({**GOOD, name: value}, GOOD) for value in neutral] == [None] * len(neutral)
    assert None not in [lost_meaning({**GOOD, name: value}, GOOD) for value in meant]


def test_fields_that_are_not_used_are_counted_over_all_rows_and_turns() -> None:
    turns = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "id": 1}, {"messages": turns[1:] * 0 + turns}, {"messages": turns, "source": "web"}]
    rows += [{"messages": [{"role": "user", "content": "q"}, turns[1]], "lang": None}]
    about = read(rows).files["t.jsonl"]
    assert about.ignored_columns == {"id": 1, "source": 1, "messages.name": 3}
    assert about.described() == ("messages rows; not used: id (in 1 row), messages.name (in 3 rows), source (in 1 row)")
    assert check(rows)["files"]["t.jsonl"]["ignored_columns"] == about.ignored_columns


def test_a_column_without_a_name_is_named() -> None:
    assert read([{"": "7", **GOOD}]).files["t.jsonl"].described() == 'instruction rows; not used: ""'


def test_fields_of_any_depth_number_and_length_are_counted() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    rows = [{**GOOD, "deep": [deep, 1], "empty": deep, f"c{number}": 1} for number in range(1_200)]
    about = read([*rows, {**GOOD, "x" * 100_000: 1}]).files["t.jsonl"]
    assert about.ignored_columns["deep"] == 1_200
    assert "empty" not in about.ignored_columns
    assert len(about.ignored_columns) == 1_001
    assert len(about.described()) < 2_000


def test_fields_can_be_left_unread_by_name() -> None:
    rules = Rules(ignore_fields=frozenset({"label", "tools", "weight"}))
    for rows in (foreign.KTO_MESSAGES, foreign.SHAREGPT_TOOLS_UNCALLED, foreign.WEIGHTS):
        assert len(read(rows, rules=rules).conversations) == len(rows)
    assert check(foreign.KTO_MESSAGES, "--ignore_fields", "label")["faulty"] == 0
    data, _ = prepare(foreign.KTO_MESSAGES, ignore_fields="label")
    assert len(data.train) == len(foreign.KTO_MESSAGES)


# --- One sum ---------------------------------------------------------------------------------------------------------


def test_rows_add_up_in_what_is_shown_and_in_the_report() -> None:
    rows = [*foreign.SHAREGPT_TOOLS, *foreign.SHAREGPT_NO_TOOLS, *foreign.SHAREGPT_TOOLS_UNCALLED]
    marked = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a<|im_end|>"}]}
    long = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "word " * 500}]}
    data, lines = prepare([*rows, marked, long], on_bad_row="skip", max_seq_length=200, val_size=1)
    report = data.report.training
    assert sum(report.rows.values()) == report.rows_read == len(rows) + 2
    assert report.faults == report.rows["refused"] == sum(report.reasons.values())
    assert report.reasons[fields.TOOLS] == 8
    sums = [line for line in lines if line.startswith("Training data: ") and " rows = " in line]
    assert sums == [
        f"Training data: {report.rows_read} rows = "
        + " + ".join(f"{count} {what}" for what, count in report.rows.items() if count)
    ]
    (refused,) = [line for line in lines if " refused: " in line]
    assert refused.startswith(f"Warning: Training data: {report.faults} of {report.rows_read} rows (")
    assert f"8 {fields.TOOLS}" in refused
    checked = check([*rows, marked, long])
    assert checked["rows"] == report.rows_read
    assert checked["reasons"][fields.TOOLS] == 8
    assert checked["used"] + checked["faults"]["count"] == checked["rows"]


# --- Placeholders ----------------------------------------------------------------------------------------------------


def test_placeholders_are_a_finding_and_a_warning() -> None:
    report = check(foreign.IDENTITY)
    assert report["placeholders"] == {
        "count": 3, "first": ["t.jsonl:1 ({{name}})", "t.jsonl:2 ({{ name }})", "t.jsonl:3 (${name})"],
    }  # fmt: skip
    assert report["faulty"] == 0
    data, lines = prepare(foreign.IDENTITY)
    assert data.report.training.placeholders.count == 3
    (warning,) = [line for line in lines if "placeholders" in line]
    assert warning.startswith("Warning: Training data: 3 rows with unfilled placeholders")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I am {{name}}.", "{{name}}"),
        ("Dear {{ customer.first_name }},", "{{ customer.first_name }}"),
        ("我是{{姓名}}。", "{{姓名}}"),
        ("Hello ${user_name}!", "${user_name}"),
        ("{% if name %}Hello", "{% if name %}"),
        ("Call <INSERT PHONE NUMBER> now", "<INSERT PHONE NUMBER>"),
        ("Yours, [YOUR NAME]", "[YOUR NAME]"),
        ("地址：[插入地址]", "[插入地址]"),
        ("【请填写姓名】您好", "【请填写姓名】"),
        ("```js\nlet a = `${b}`;\n```\nSigned, {{author}}", "{{author}}"),
        ("Use `{{ name }}` in the template.", None),
        ("```jinja\nHello {{ name }}\n```", None),
        ("console.log(`Hello ${name}`);", None),
        ('echo "${HOME}"; ls', None),
        (r"\frac{{a}}{{b}} and x^{{n}}", None),
        (r"$\mathbf{{x}}$", None),
        ('{"a": {"b": {"c": 1}}}', None),
        ("A set {{1}, {2}} of sets", None),
        ("for (const x of xs) { print(`${x}`) }", None),
        ("[1] See the notes [your own] <b>bold</b>", None),
        ("Your Name is [John]", None),
        ("<image>Who are they?", None),
    ],
)
def test_placeholders_are_told_from_code(text: str, found: str | None) -> None:
    assert first_placeholder(text, asked=False) == found


def test_a_picture_that_is_not_there_is_a_placeholder_in_a_question() -> None:
    assert first_placeholder("<image>Who are they?", asked=True) == "<image>"


@pytest.mark.parametrize("rows", [foreign.KTO_MESSAGES], ids=["KTO"])
def test_the_message_says_how_to_train_without_the_field(rows: foreign.Rows) -> None:
    with pytest.raises(UserError, match="--ignore_fields"):
        read(rows)
