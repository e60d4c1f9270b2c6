"""The commands of a chat: one table, from which help, completion and suggestions come, and what each does."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qingtune.answering.chat.files import add_conversation, path_of, read_conversation
from qingtune.answering.chat.session import ChatSession
from qingtune.answering.generate import Decoding
from qingtune.answering.thinking import split_thinking
from qingtune.config.commands import ChatOptions, InferConfig
from qingtune.config.flags import value_of
from qingtune.config.load import check_flags
from qingtune.config.training import Settings
from qingtune.data.format import Message
from qingtune.errors import UserError


@dataclass
class ChatState:
    """All that commands look at and change.

    Attributes:
        session: the turns.
        decoding: how answers are drawn.
        options: what else /set changes.
        unanswered: a question that got no answer, which is not among the turns; /retry asks it again.
        first_system_prompt: the system message that the chat began with.
    """

    session: ChatSession
    decoding: Decoding
    options: ChatOptions = field(default_factory=ChatOptions)
    unanswered: Message | None = None
    first_system_prompt: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.first_system_prompt = self.session.system_prompt


@dataclass(frozen=True)
class ChatCommand:
    """A command: its name, what follows it, and a function of the state and that text which gives the note to show.

    The loop itself obeys commands without a function.
    """

    name: str
    argument: str
    help: str
    obey: Callable[[ChatState, str], str] | None


def find_command(line: str) -> tuple[ChatCommand, str]:
    """The command of a line that begins with a slash, and the text after it.

    Raises:
        UserError: there is no such command, or it takes no text.
    """
    name, text = (*line.split(None, 1), "")[:2]
    text = text.strip()
    command = next((command for command in COMMANDS if command.name == _OTHER_NAMES.get(name, name)), None)
    if command is None:
        near = _nearest(name, [command.name for command in COMMANDS])
        fix = f"Did you mean {near}?" if near else "/help lists them; // sends a message that begins with /."
        raise UserError(f"{name} is not a command", fix=fix)
    if text and not command.argument:
        raise UserError(f"{name} takes no argument")
    return command, text


def settable() -> dict[str, type[Settings]]:
    """What /set knows: each name with the schema that has its checks."""
    decoding = {name.name: InferConfig for name in fields(Decoding) if name.name in InferConfig.model_fields}
    return {**decoding, **dict.fromkeys(ChatOptions.model_fields, ChatOptions)}


def _nearest(word: str, known: Sequence[str]) -> str | None:
    begun = [name for name in known if len(word) > 1 and name.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


# --- What they do ----------------------------------------------------------------------------------------------------


def _help(state: ChatState, text: str) -> str:
    width = max(len(f"{command.name} {command.argument}") for command in COMMANDS)
    listed = [f"{f'{command.name} {command.argument}':{width}}  {command.help}" for command in COMMANDS]
    return "\n".join([*listed, *KEYS])


def _system(state: ChatState, text: str) -> str:
    session = state.session
    if text:
        session.system_prompt = state.first_system_prompt if text == "default" else text
    shown = "none (the template's default)" if session.system_prompt is None else session.system_prompt
    return f"[system: {shown}]" + (" Earlier turns are kept; /clear removes them." if text and session.turns else "")


def _clear(state: ChatState, text: str) -> str:
    state.session.turns.clear()
    state.unanswered = None
    return "[cleared]"


def _undo(state: ChatState, text: str) -> str:
    state.unanswered = None
    return "[nothing to undo]" if state.session.undo() is None else "[taken back]"


def _show(state: ChatState, text: str) -> str:
    return "\n".join(_turn(state, message) for message in state.session.messages()).strip("\n") or "[no turns yet]"


def _turn(state: ChatState, message: Message) -> str:
    if message.role == "user":
        return f"\n> {message.content}"
    if message.role != "assistant":
        return f"[{message.role}] {message.content}"
    thinking, answer = split_thinking(message.content)
    if not thinking.strip() or state.options.thinking == "show":
        return message.content
    return f"[thinking: {len(thinking.strip()):,} characters]\n{answer}"


def _save(state: ChatState, text: str) -> str:
    if not text:
        raise UserError("/save needs a file name.")
    if not state.session.turns:
        return "[nothing to save]"
    add_conversation(path_of(text), state.session.messages())
    thought = any(split_thinking(turn.content)[0] for turn in state.session.turns if turn.role == "assistant")
    return f"[added to {path_of(text)}{', with the thinking' * thought}]"


def _load(state: ChatState, text: str) -> str:
    if not text:
        raise UserError("/load needs a file name.")
    numbered = re.fullmatch(r"(.*\S)\s+([0-9]{1,9})", text, re.DOTALL)
    name, line = (numbered[1], int(numbered[2])) if numbered and not os.path.exists(path_of(text)) else (text, None)
    path = path_of(name)
    conversation, faults = read_conversation(path, line)
    system, turns = None, list(conversation.messages)
    if turns[0].role == "system":
        system = turns.pop(0).content
    notes = [f"[{len(turns)} turns of {conversation.origin}; /show lists them]"]
    if faults:
        notes.append(f"[rows that cannot be used: {len(faults):,}; the first: {faults[0]}]")
    changed = system != state.session.system_prompt
    state.session.system_prompt, state.session.turns, state.unanswered = system, turns, None
    return "\n".join([*notes, _system(state, "")] if changed else notes)


def _set(state: ChatState, text: str) -> str:
    known = settable()
    name, value = (*re.split(r"\s*=\s*|\s+", text, maxsplit=1), "")[:2]
    if name and name not in known:
        near = _nearest(name, list(known))
        raise UserError(
            f'"{name}" is not a chat setting', fix=f'Did you mean "{near}"?' if near else f"It has {', '.join(known)}."
        )
    if value:
        _change(state, name, value, known[name])
    if name:
        return f"{name}  {_value(state, name)}"
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {_value(state, name):6}  {_meaning(name)}".rstrip() for name in known)


def _change(state: ChatState, name: str, value: str, schema: type[Settings]) -> None:
    try:
        checked: Any = getattr(check_flags(schema, {name: value}), name)
    except UserError as error:
        raise UserError(error.what, fix=error.fix) from None
    if schema is ChatOptions:
        state.options = state.options.model_copy(update={name: checked})
    else:
        state.decoding = replace(state.decoding, **{name: checked})
    if name == "seed":
        state.session.asked = 0  # so that the same seed gives the same answers again


def _value(state: ChatState, name: str) -> str:
    return str(getattr(state.options if name in ChatOptions.model_fields else state.decoding, name))


def _meaning(name: str) -> str:
    """What a setting of the chat's own means; those of the decoding are explained with the flags of that name."""
    field = ChatOptions.model_fields.get(name)
    return f"{value_of(field)}: {field.description}" if field else ""


COMMANDS = (
    ChatCommand("/help", "", "this list", _help),
    ChatCommand("/system", "[TEXT]", "show or set the system message; TEXT default: the first one", _system),
    ChatCommand("/retry", "", "answer the last question again, with other random samples", None),
    ChatCommand("/undo", "", "take back the last question and answer", _undo),
    ChatCommand("/clear", "", "remove all turns; keep the system message", _clear),
    ChatCommand("/show", "", "list the turns", _show),
    ChatCommand("/save", "FILE", "add the chat to FILE, a JSON line that can be trained on", _save),
    ChatCommand("/load", "FILE [LINE]", "continue FILE's last conversation, or the one on LINE", _load),
    ChatCommand("/set", "[NAME VALUE]", "list or change settings: temperature, stats, thinking, ...", _set),
    ChatCommand("/exit", "", "leave", None),
)
KEYS = (
    "",
    "Enter sends; Alt+Enter, Ctrl-J or a \\ at the end makes a new line. Ctrl-R",
    "searches the history. // at the start of a line sends text that begins with /.",
    "Ctrl-C stops an answer and keeps the text so far; at the prompt it clears the",
    "line; pressed twice it exits, like Ctrl-D.",
)
_OTHER_NAMES = {"/quit": "/exit", "/?": "/help"}
