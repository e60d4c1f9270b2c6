"""Rows -> conversations. The format is detected per file; every fault is reported with its origin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qingtune.config.roles import ROLES, Role
from qingtune.data.faults import fault_lines, faulty_rows
from qingtune.data.fields import Refusal, RowError, is_empty, kind_of_file, lost_in_turn, lost_meaning
from qingtune.data.placeholders import first_placeholder
from qingtune.data.read import Fault, Places, Row, read_rows
from qingtune.data.rules import USUAL, MemoryBound, Rules
from qingtune.errors import UserError, shorten
from qingtune.output.units import counted

MOST_UNKNOWN = 1000  # rows read in the hope that one of them shows the format
SHOWN_FIELDS = 20
MOST_FIELDS = 1000  # that are not used, counted apart
OF_EVALUATION = "form"  # a column that evaluation alone reads; see answer_form.py


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row, ready for the chat template; or, where `text` is given, plain text without a template."""

    messages: tuple[Message, ...]
    origin: str
    text: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The contents of all turns, or the plain text."""
        return tuple(message.content for message in self.messages) if self.text is None else (self.text,)


@dataclass
class FileFacts:
    """What a file turned out to be.

    Attributes:
        format: the name of its format.
        ignored_columns: fields that the format does not use, and how many rows hold something in them; those of turns
            after the name of their column, as `messages.name`.
        used: rows that became conversations.
    """

    format: str = ""
    ignored_columns: dict[str, int] = field(default_factory=dict)
    used: int = 0

    def described(self) -> str:
        """The format and the fields that are not used, as a few words."""
        unused = [
            name if count >= self.used else f"{name} (in {counted(count, 'row')})"
            for name, count in sorted(self.ignored_columns.items())
        ]
        more = f" and {len(unused) - SHOWN_FIELDS:,} more" if len(unused) > SHOWN_FIELDS else ""
        shown = f"; not used: {', '.join(unused[:SHOWN_FIELDS])}{more}" if unused else ""
        return f"{self.format or 'no'} rows{shown}"


@dataclass
class Reading:
    """What was read from a list of files; `held_out` of the conversations are set aside for evaluation."""

    conversations: list[Conversation] = field(default_factory=list)
    files: dict[str, FileFacts] = field(default_factory=dict)
    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    placeholders: Places = field(default_factory=Places)
    held_out: int = 0


def read_conversations(
    paths: Sequence[str], system_prompt: str | None, on_bad_row: str, rules: Rules = USUAL
) -> Reading:
    """Read files into conversations.

    Args:
        paths: the files, in order.
        system_prompt: system message for rows that have none; None leaves them without.
        on_bad_row: "raise" or "skip".

    Raises:
        UserError: a file is of no known format, rows are faulty and on_bad_row is "raise", no row is left, or the rows
            take more memory than the rules allow.
    """
    reading, room = Reading(), MemoryBound(rules)
    for path in paths:
        about = FileFacts()
        for row in conversations_of(path, system_prompt, about, rules):
            reading.rows += 1
            room.take(_bytes_of(row), row.origin)
            if isinstance(row, Fault):
                reading.faults.append(row)
                continue
            reading.conversations.append(row)
            if placeholder := placeholder_in(row):
                reading.placeholders.add(f"{row.origin} ({placeholder})")
        if about.format:
            reading.files[path] = about
    if reading.faults and on_bad_row == "raise":
        raise faulty_rows(reading.faults, reading.rows)
    if not reading.conversations:
        shown = "".join(f"\n{line}" for line in fault_lines(reading.faults))
        raise UserError(
            f"no usable row ({reading.rows:,} read, {len(reading.faults):,} refused){shown}", where=", ".join(paths)
        )
    return reading


def _bytes_of(row: Conversation | Fault) -> int:
    """Memory that a row takes while it is kept."""
    if isinstance(row, Fault):
        return 400 + len(row.reason)
    return 400 + sum(100 + sys.getsizeof(text) for text in row.texts)


def placeholder_in(row: Conversation) -> str | None:
    """The first placeholder of a template that was left unfilled in a row's texts."""
    if row.text is not None:
        return first_placeholder(row.text, asked=False)
    found = (first_placeholder(message.content, asked=message.role == "user") for message in row.messages)
    return next(filter(None, found), None)


def conversations_of(
    path: str, system_prompt: str | None, about: FileFacts, rules: Rules = USUAL
) -> Iterator[Conversation | Fault]:
    """Yield a file's rows as conversations, or a Fault for each row that is not one.

    Args:
        system_prompt: system message for rows that have none; None leaves them without.
        about: gets the file's format as soon as it is known, and counts.

    Raises:
        UserError: the file cannot be read, or its rows are of no known format.
    """
    waiting: list[Row] = []
    for row in read_rows(path, rules):
        if isinstance(row, Fault):
            yield row
            continue
        row = Row(without_fields(row.values, rules.ignore_fields), row.origin)
        if not about.format:
            about.format = detect(row.values)
        if about.format:
            yield from (convert_row(waited, about, system_prompt, rules) for waited in (*waiting, row))
            waiting.clear()
        elif refusal := kind_of_file(row.values):
            yield Fault(row.origin, str(refusal), refusal.kind, refusal.sign)
        else:
            waiting.append(row)
            if len(waiting) == MOST_UNKNOWN:
                break
    if waiting:
        known = "; ".join(" + ".join(format_.needed) for format_ in FORMATS.values())
        columns = shorten(", ".join(f'"{column}"' for column in waiting[0].values), 300) or "none"
        raise UserError(
            f"the columns ({columns}) match no known format",
            where=waiting[0].origin,
            fix=f"The known formats are {known}. {_how_to_rename(waiting[0].values)}, or see docs/data.md.",
        )


def _how_to_rename(values: Collection[str]) -> str:
    """What to do with the columns of no known format; exact where one asks and one answers."""
    asking, answering = (next((name for name in names if name in values), None) for names in (_ASKING, _ANSWERING))
    if asking is None or answering is None:
        return "Rename the keys"
    pairs = [(asking, "instruction"), (answering, "output")]
    return "Rename " + " and ".join(f'"{name}" to "{known}"' for name, known in pairs if name != known)


def without_fields(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A row without the fields of these names, in its turns neither."""
    if not names:
        return values
    return {
        name: [without_fields(turn, names) if isinstance(turn, dict) else turn for turn in value]
        if name in TURN_COLUMNS and isinstance(value, list)
        else value
        for name, value in values.items()
        if name.lower() not in names
    }


def detect(values: dict[str, Any]) -> str:
    """The name of the format that a row has; empty where it has none."""
    return next((name for name, form in FORMATS.items() if values.keys() >= {*form.needed}), "")


def convert_row(row: Row, about: FileFacts, system_prompt: str | None, rules: Rules) -> Conversation | Fault:
    """A row of a known format as a conversation, or why it is not one."""
    try:
        conversation = as_turns(row, about.format, rules, labels_answer=about.format == "text")
        conversation = conversation if conversation.text is not None else _checked(conversation, system_prompt)
    except RowError as error:
        return Fault(row.origin, str(error), error.kind, error.sign)
    about.used += 1
    for name in _unread(row.values, _read_by(about.format)):
        name = name if name in about.ignored_columns or len(about.ignored_columns) < MOST_FIELDS else "other fields"
        about.ignored_columns[name] = about.ignored_columns.get(name, 0) + 1
    return conversation


def as_turns(row: Row, form: str, rules: Rules, *, labels_answer: bool = False) -> Conversation:
    """A row of a format as a conversation, the order of its turns unchecked.

    Args:
        labels_answer: as in `lost_meaning`.

    Raises:
        RowError: the row does not hold what the format needs, has too many turns, or means more than would be read.
    """
    if refusal := lost_meaning(row.values, _read_by(form), labels_answer=labels_answer):
        raise refusal
    conversation = FORMATS[form].convert(row)
    if (turns := len(conversation.messages)) > rules.max_row_turns:
        raise RowError(f"{turns:,} turns; raise max_row_turns if this is intended")
    return conversation


def _read_by(form: str) -> tuple[str, ...]:
    return (*FORMATS[form].columns, OF_EVALUATION)


def _unread(values: dict[str, Any], read: Collection[str]) -> set[str]:
    """The fields of a row and of its turns that hold something and are not read."""
    names = {shorten(name) or '""' for name, value in values.items() if name not in read and not is_empty(value)}
    for column in TURN_COLUMNS.intersection(values, read):
        for turn in values[column] if isinstance(values[column], list) else ():
            unread = (name for name, value in turn.items() if name not in _OF_TURNS and not is_empty(value))
            names |= {f"{column}.{shorten(name)}" for name in unread}
    return names


def _checked(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Check the order of roles and put the system prompt in front where the row has none."""
    messages = conversation.messages
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to train on")
    for before, role in pairwise((None, *(message.role for message in messages))):
        if role == "system" and before is not None:
            raise RowError("a system message that is not the first")
        if role == "assistant" and before in (None, "system", "assistant"):
            raise RowError("an assistant turn without a user turn before it")
        if role == "tool" and before in (None, "system"):
            raise RowError("a tool turn without a turn before it")
    if messages[-1].role != "assistant":
        raise RowError("the last turn is not an assistant turn")
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
        raise RowError(f'"{name}" is {type(value).__name__}, not text')
    if not value.strip().strip(_INVISIBLE) and not empty:
        raise RowError(f'"{name}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f'"{name}" contains half of a surrogate pair, which is not a character') from None
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


def _turns(turns: object, column: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if turns is None:
        raise RowError(f'"{column}" is missing')
    if not isinstance(turns, list) or not turns:
        raise RowError(f'"{column}" is not a list of turns')
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError(f'turn {number} of "{column}" is not an object')
        if refusal := lost_in_turn(turn, turn.get(role_key), turn.get(content_key)):
            raise Refusal(refusal.kind, f"turn {number}: {refusal.sign}")
        role = ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise RowError(f'turn {number} has the unknown role {shorten(repr(turn.get(role_key)))} under "{role_key}"')
        try:
            messages.append(Message(role, _text_of(turn, content_key, empty=role == "system")))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from None
    return tuple(messages)


def _after_system(row: Row, messages: tuple[Message, ...]) -> Conversation:
    """The turns after the system message of a separate column, if there is one."""
    system = _text_of(row.values, "system", empty=True)
    return Conversation((Message("system", system), *messages) if system else messages, row.origin)


def _messages(row: Row) -> Conversation:
    return _after_system(row, _turns(row.values.get("messages"), "messages", "role", "content"))


def _sharegpt(row: Row) -> Conversation:
    turns = row.values.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
    return _after_system(row, _turns(turns, "conversations", *keys))


def _completion(row: Row) -> Conversation:
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _turns(prompt, "prompt", "role", "content")
        return _after_system(row, before + _turns(completion, "completion", "role", "content"))
    messages = (
        Message("user", _text_of(row.values, "prompt")),
        Message("assistant", _text_of(row.values, "completion")),
    )
    return _after_system(row, messages)


def _text(row: Row) -> Conversation:
    return Conversation((), row.origin, text=_text_of(row.values, "text"))


@dataclass(frozen=True)
class Format:
    """A form of rows: the columns it needs, all that it reads, and how it becomes a conversation."""

    needed: tuple[str, ...]
    columns: tuple[str, ...]
    convert: Callable[[Row], Conversation]


FORMATS = {
    "messages": Format(("messages",), ("messages", "system"), _messages),
    "sharegpt": Format(("conversations",), ("conversations", "system"), _sharegpt),
    "instruction": Format(
        ("instruction", "output"), ("instruction", "input", "output", "system", "history"), _instruction
    ),
    "completion": Format(("prompt", "completion"), ("prompt", "completion", "system"), _completion),
    "text": Format(("text",), ("text",), _text),
}
# What other data sets call the columns of "instruction", the likeliest first.
_ASKING = ("instruction", "question", "query", "prompt", "input")
_ANSWERING = ("output", "answer", "response", "completion")
TURN_COLUMNS = frozenset({"messages", "conversations", "prompt", "completion"})
_OF_TURNS = frozenset({"role", "content", "from", "value"})


def prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """The turns before the last answer: what the model is shown at inference."""
    return conversation.messages[:-1]
