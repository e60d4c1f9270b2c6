"""Rows that are asked: prompts for inference, rows to evaluate on, with an answer or without, and bundled samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingtune.config.roles import is_answer
from qingtune.data.fields import ANSWER_FIELDS, RowError
from qingtune.data.format import (
    Conversation,
    FileFacts,
    Message,
    as_turns,
    convert_row,
    detect,
    prompt_of,
    read_conversations,
    without_fields,
)
from qingtune.data.read import Fault, Row, read_rows
from qingtune.data.rules import USUAL, MemoryBound, Rules
from qingtune.errors import UserError

BUNDLED_SHOWN = 3


def rows_with_prompts(path: str, rules: Rules = USUAL) -> Iterable[tuple[dict[str, Any], tuple[Message, ...] | str]]:
    """Read a file of prompts: each row with its prompt, whether or not the row has an answer.

    A row is of any training format, its answer left out or not, or has just a "prompt". Plain "text" rows give a str.

    Raises:
        UserError: a row has no prompt, or one of which a part would be left out.
    """
    room = MemoryBound(rules)
    for row in read_rows(path, rules):
        if isinstance(row, Fault):
            raise UserError(row.reason, where=row.origin)
        room.take(1000 + 4 * row.size, row.origin)  # objects of Python around the text
        try:
            prompt = _prompt_of_row(row, rules)
            json.dumps(row.values, ensure_ascii=False, default=str).encode()  # as the answer's line repeats it
            yield row.values, prompt
        except UnicodeEncodeError:
            raise UserError("contains half of a surrogate pair, which is not a character", where=row.origin) from None
        except RowError as error:
            fix = None if error.kind else 'A row needs a "prompt", for example.'
            raise UserError(str(error), where=row.origin, fix=fix) from None


def _prompt_of_row(row: Row, rules: Rules) -> tuple[Message, ...] | str:
    values = without_fields(row.values, rules.ignore_fields | ANSWER_FIELDS)
    name, values = _with_some_answer(values)
    conversation = as_turns(Row(values, row.origin), name, rules)
    if conversation.text is not None:
        return conversation.text
    turns = conversation.messages
    prompt = turns[:-1] if turns[-1].role == "assistant" else turns
    if not any(message.role == "user" for message in prompt):
        raise RowError("no user turn, so there is nothing to answer")
    return prompt


def _with_some_answer(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format of a row that may lack its answer, and the row with something where the format needs one."""
    if "messages" in values or "conversations" in values:
        return ("messages" if "messages" in values else "sharegpt"), values
    if "instruction" in values:
        return "instruction", {**values, "output": "-"}
    if "prompt" not in values and "text" in values:
        return "text", values
    prompt = values.get("prompt")
    answer = [{"role": "assistant", "content": "-"}] if isinstance(prompt, list) else "-"
    return "completion", {**values, "prompt": prompt, "completion": answer}


# --- Rows to evaluate on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationRow:
    """A row to evaluate on.

    Attributes:
        values: as they stand in the file.
        prompt: the turns before the answer; None for plain text, which asks nothing.
        conversation: as in training; None where the row has no answer to compare with.
    """

    values: dict[str, Any]
    origin: str
    prompt: tuple[Message, ...] | None
    conversation: Conversation | None

    @property
    def reference(self) -> str | None:
        """The answer to compare with."""
        return self.conversation.messages[-1].content if self.conversation and self.prompt else None


def asked_rows(path: str, system_prompt: str | None, rules: Rules = USUAL) -> Iterator[EvaluationRow | Fault]:
    """Yield a file's rows, each of any training format, with its answer or without; a Fault in place of each other.

    Args:
        system_prompt: system message for rows that have none; None leaves them without.

    Raises:
        UserError: the file cannot be read.
    """
    for row in read_rows(path, rules):
        if isinstance(row, Fault):
            yield row
            continue
        try:
            yield _asked(row, system_prompt, rules)
        except RowError as error:
            yield Fault(row.origin, str(error), error.kind, error.sign)


def _asked(row: Row, system_prompt: str | None, rules: Rules) -> EvaluationRow | Fault:
    if _has_answer(row.values):
        read = Row(without_fields(row.values, rules.ignore_fields), row.origin)
        converted = convert_row(read, FileFacts(detect(read.values)), system_prompt, rules)
        if isinstance(converted, Fault):
            return converted
        prompt = prompt_of(converted) if converted.text is None else None
        return EvaluationRow(row.values, row.origin, prompt, converted)
    prompt = _prompt_of_row(row, rules)
    if isinstance(prompt, str):
        raise RowError("no user turn, so there is nothing to answer")
    if system_prompt is not None and prompt[0].role != "system":
        prompt = (Message("system", system_prompt), *prompt)
    return EvaluationRow(row.values, row.origin, prompt, None)


_ANSWERS = {"messages": "messages", "sharegpt": "conversations", "instruction": "output", "completion": "completion"}


def _has_answer(values: dict[str, Any]) -> bool:
    """Whether the row holds what is trained in training; null is nothing, nor are turns that end with the user's."""
    name = detect(values)
    answer = values.get(_ANSWERS.get(name, name))
    if name in ("messages", "sharegpt"):
        last = answer[-1] if isinstance(answer, list) and answer else None
        return isinstance(last, dict) and is_answer(last)
    return answer is not None


# --- The bundled samples ---------------------------------------------------------------------------------------------


def bundled_rows(*, chinese: bool) -> list[Conversation]:
    """The first bundled samples that no bundled configuration trains on."""
    path = bundled_data() / ("store_xhs_heldout.jsonl" if chinese else "store_posts_en_heldout.jsonl")
    return read_conversations([str(path)], None, "raise").conversations[:BUNDLED_SHOWN]


def bundled_data() -> Path:
    """The folder of bundled samples: data/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    checkout = package.parent / "data"
    return checkout if (checkout / "store_xhs_heldout.jsonl").exists() else package / "bundled"
