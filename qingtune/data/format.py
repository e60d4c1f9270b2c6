"""Rows -> conversations. The format is detected per file; every fault is reported with its origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qingtune.data.read import Fault, Row, read_rows
from qingtune.errors import UserError, shorten

Role = Literal["system", "user", "assistant", "tool"]
SHOWN_FAULTS = 10
MOST_UNKNOWN = 1000  # rows read in the hope that one of them tells the format
OF_EVALUATION = "form"  # a column that evaluation alone reads; see answer_form.py


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """A row, ready for the chat template; or, where `text` is given, plain text without a template."""

    messages: tuple[Message, ...]
    origin: str
    text: str | None = None


@dataclass
class FileFacts:
    """What a file turned out to be: the name of its format, and columns that the format does not use."""

    format: str = ""
    ignored_columns: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """What was read from a list of files."""

    conversations: list[Conversation] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    ignored_columns: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    faults: list[Fault] = field(default_factory=list)


class RowError(Exception):
    """A row that does not hold what its format needs."""


def read_conversations(paths: Sequence[str], system_prompt: str | None, on_bad_row: str) -> Reading:
    """Read files into conversations.

    Args:
        paths: the files, in order.
        system_prompt: system message for rows that have none; None leaves them without.
        on_bad_row: "raise" or "skip".

    Raises:
        UserError: a file is of no known format, rows are faulty and on_bad_row is "raise", or no row is left.
    """
    reading = Reading()
    for path in paths:
        about = FileFacts()
        for row in conversations_of(path, system_prompt, about):
            reading.rows += 1
            if isinstance(row, Fault):
                reading.faults.append(row)
            else:
                reading.conversations.append(row)
        if about.format:
            reading.formats[path], reading.ignored_columns[path] = about.format, about.ignored_columns
    if reading.faults and on_bad_row == "raise":
        raise faulty_rows(reading.faults, reading.rows)
    if not reading.conversations:
        shown = "".join(f"\n{fault}" for fault in reading.faults[:SHOWN_FAULTS])
        raise UserError(
            f"no usable row ({reading.rows:,} read, {len(reading.faults):,} refused){shown}", where=", ".join(paths)
        )
    return reading


def faulty_rows(faults: Sequence[Fault], rows: int, fix: str = "Fix the rows or pass --on_bad_row skip.") -> UserError:
    """The error that lists the first faults and says what can be done."""
    shown = "\n".join(str(fault) for fault in faults[:SHOWN_FAULTS])
    more = f"\n... and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
    return UserError(f"{shown}{more}\n({len(faults):,} of {rows:,} rows.) {fix}")


def conversations_of(path: str, system_prompt: str | None, about: FileFacts) -> Iterator[Conversation | Fault]:
    """Yield a file's rows as conversations, a Fault in place of each that is none.

    Args:
        system_prompt: system message for rows that have none; None leaves them without.
        about: told what the file is, as soon as that is known.

    Raises:
        UserError: the file cannot be read, or its rows are of no known format.
    """
    waiting: list[Row] = []
    for row in read_rows(path):
        if isinstance(row, Fault):
            yield row
            continue
        waiting.append(row)
        if not about.format and (name := _detect(row.values)):
            about.format = name
            about.ignored_columns = sorted(set(row.values) - {*FORMATS[name].columns, OF_EVALUATION})
        if about.format:
            yield from (_convert(waited, about.format, system_prompt) for waited in waiting)
            waiting.clear()
        elif len(waiting) == MOST_UNKNOWN:
            break
    if waiting:
        known = "; ".join(" + ".join(format_.needed) for format_ in FORMATS.values())
        columns = shorten(", ".join(f'"{column}"' for column in waiting[0].values), 300) or "none"
        raise UserError(
            f"the columns ({columns}) fit no known format", where=waiting[0].origin, fix=f"Known are: {known}."
        )


def _detect(values: dict[str, Any]) -> str:
    for name, format_ in FORMATS.items():
        if all(column in values for column in format_.needed):
            return name
    return ""


def _convert(row: Row, name: str, system_prompt: str | None) -> Conversation | Fault:
    try:
        conversation = FORMATS[name].convert(row)
        return conversation if conversation.text is not None else _checked(conversation, system_prompt)
    except RowError as error:
        return Fault(row.origin, str(error))


def _checked(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Check the order of roles and put the system prompt in front where the row has none."""
    messages = conversation.messages
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no assistant turn, so nothing to train on")
    for place, message in enumerate(messages):
        before = messages[place - 1].role if place else None
        if message.role == "system" and place:
            raise RowError("a system message that is not the first")
        if message.role == "assistant" and before in (None, "system", "assistant"):
            raise RowError("an assistant turn without a user turn before it")
        if message.role == "tool" and before in (None, "system"):
            raise RowError("a tool turn without a turn before it")
    if messages[-1].role != "assistant":
        raise RowError("the last turn is not the assistant's")
    if system_prompt is not None and messages[0].role != "system":
        messages = (Message("system", system_prompt), *messages)
    return Conversation(messages, conversation.origin)


# --- The formats -----------------------------------------------------------------------------------------------------


_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # characters without width


def _text_of(values: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """A column's text; RowError where it is missing, not text, empty (unless allowed) or not encodable."""
    value = values.get(name)
    if value is None:
        if empty:
            return ""
        raise RowError(f'"{name}" is missing')
    if not isinstance(value, str):
        raise RowError(f'"{name}" is {type(value).__name__}; text is wanted')
    if not value.strip().strip(_INVISIBLE) and not empty:
        raise RowError(f'"{name}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f'"{name}" holds half of a surrogate pair, which is no character') from None
    return value


def _instruction(row: Row) -> Conversation:
    values = row.values
    prompt = _text_of(values, "instruction")
    if extra := _text_of(values, "input", empty=True):
        prompt = f"{prompt}\n\n{extra}"
    messages: list[Message] = []
    if system := _text_of(values, "system", empty=True):
        messages.append(Message("system", system))
    history = values.get("history") or []
    for pair in history if isinstance(history, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise RowError('"history" is not a list of [question, answer] pairs')
        question, answer = (_text_of({"history": part}, "history") for part in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    messages += [Message("user", prompt), Message("assistant", _text_of(values, "output"))]
    return Conversation(tuple(messages), row.origin)


_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def _turns(turns: object, column: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if turns is None:
        raise RowError(f'"{column}" is missing')
    if not isinstance(turns, list) or not turns:
        raise RowError(f'"{column}" is not a list of turns')
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError(f'turn {number} of "{column}" is not an object')
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise RowError(f'turn {number} has the unknown role {shorten(repr(turn.get(role_key)))} under "{role_key}"')
        if turn.get("tool_calls"):
            raise RowError(f"turn {number} has tool_calls, which cannot be trained on yet")
        try:
            messages.append(Message(role, _text_of(turn, content_key, empty=role == "system")))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return tuple(messages)


def _messages(row: Row) -> Conversation:
    return Conversation(_turns(row.values.get("messages"), "messages", "role", "content"), row.origin)


def _sharegpt(row: Row) -> Conversation:
    turns = row.values.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    messages = _turns(turns, "conversations", *keys)
    if system := _text_of(row.values, "system", empty=True):
        messages = (Message("system", system), *messages)
    return Conversation(messages, row.origin)


def _completion(row: Row) -> Conversation:
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _turns(prompt, "prompt", "role", "content")
        return Conversation(before + _turns(completion, "completion", "role", "content"), row.origin)
    messages = (
        Message("user", _text_of(row.values, "prompt")),
        Message("assistant", _text_of(row.values, "completion")),
    )
    return Conversation(messages, row.origin)


def _text(row: Row) -> Conversation:
    return Conversation((), row.origin, text=_text_of(row.values, "text"))


@dataclass(frozen=True)
class Format:
    """A form of rows: the columns it needs, all that it reads, and how it becomes a conversation."""

    needed: tuple[str, ...]
    columns: tuple[str, ...]
    convert: Callable[[Row], Conversation]


FORMATS = {
    "messages": Format(("messages",), ("messages",), _messages),
    "sharegpt": Format(("conversations",), ("conversations", "system"), _sharegpt),
    "instruction": Format(
        ("instruction", "output"), ("instruction", "input", "output", "system", "history"), _instruction
    ),
    "completion": Format(("prompt", "completion"), ("prompt", "completion"), _completion),
    "text": Format(("text",), ("text",), _text),
}


def prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """The turns before the last answer: what the model is shown at inference."""
    return conversation.messages[:-1]


def rows_with_prompts(path: str) -> Iterable[tuple[dict[str, Any], tuple[Message, ...] | str]]:
    """Read a file of prompts: each row with its prompt, whether or not the row has an answer.

    A row is of any training format, its answer left out or not, or has just a "prompt". Plain "text" rows give a str.

    Raises:
        UserError: a row has no prompt.
    """
    for row in read_rows(path):
        if isinstance(row, Fault):
            raise UserError(row.reason, where=row.origin)
        try:
            prompt = _prompt_of_row(row)
            if not isinstance(prompt, str) and not any(message.role == "user" for message in prompt):
                raise RowError("no user turn, so nothing to answer")
            yield row.values, prompt
        except RowError as error:
            raise UserError(str(error), where=row.origin, fix='A row needs a "prompt", for example.') from None


def _prompt_of_row(row: Row) -> tuple[Message, ...] | str:
    values = row.values
    if "messages" in values or "conversations" in values:
        turns = (_messages if "messages" in values else _sharegpt)(row).messages
        return turns[:-1] if turns[-1].role == "assistant" else turns
    if "instruction" in values:
        return prompt_of(_instruction(Row({**values, "output": "-"}, row.origin)))
    if isinstance(values.get("prompt"), list):
        return _turns(values["prompt"], "prompt", "role", "content")
    if "prompt" not in values and "text" in values:
        return _text_of(values, "text")
    return prompt_of(_completion(Row({"prompt": values.get("prompt"), "completion": "-"}, row.origin)))


# --- Rows to evaluate on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
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


def asked_rows(path: str, system_prompt: str | None) -> Iterator[Asked | Fault]:
    """Yield a file's rows, each of any training format, with its answer or without; a Fault in place of each other.

    Args:
        system_prompt: system message for rows that have none; None leaves them without.

    Raises:
        UserError: the file cannot be read.
    """
    for row in read_rows(path):
        if isinstance(row, Fault):
            yield row
            continue
        try:
            yield _asked(row, system_prompt)
        except RowError as error:
            yield Fault(row.origin, str(error))


def _asked(row: Row, system_prompt: str | None) -> Asked:
    if _has_answer(row.values):
        converted = _convert(row, _detect(row.values), system_prompt)
        if isinstance(converted, Fault):
            raise RowError(converted.reason)
        prompt = prompt_of(converted) if converted.text is None else None
        return Asked(row.values, row.origin, prompt, converted)
    prompt = _prompt_of_row(row)
    if isinstance(prompt, str) or not any(message.role == "user" for message in prompt):
        raise RowError("no user turn, so nothing to answer")
    if system_prompt is not None and prompt[0].role != "system":
        prompt = (Message("system", system_prompt), *prompt)
    return Asked(row.values, row.origin, prompt, None)


_ANSWERS = {"messages": "messages", "sharegpt": "conversations", "instruction": "output", "completion": "completion"}


def _has_answer(values: dict[str, Any]) -> bool:
    """Whether the row holds what is trained in training; null is nothing, nor are turns that end with the user's."""
    name = _detect(values)
    answer = values.get(_ANSWERS.get(name, name))
    if name in ("messages", "sharegpt"):
        last = answer[-1] if isinstance(answer, list) and answer else None
        return isinstance(last, dict) and _ROLES.get(str(last.get("role", last.get("from")))) == "assistant"
    return answer is not None
