"""The chat at the terminal: reads lines, streams answers, knows a few commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qingtune.data.format import Message
from qingtune.errors import UserError
from qingtune.generation import Answer, ChatSession, Decoding

HELP = """/help            this list
/system [TEXT]   show or set the system message; starts the chat anew
/clear           forget all turns
/retry           answer the last question again, otherwise
/undo            take back the last question and answer
/save FILE       write the chat as a line of JSON that can be trained on
/exit            leave (Ctrl-D too); Ctrl-C stops an answer and keeps what is there"""


def chat(answer: Callable[[Sequence[int], Decoding], Answer], session: ChatSession, decoding: Decoding) -> None:
    """Talk until /exit or the end of input.

    Args:
        answer: starts an answer to a prompt's ids.
        session: the turns; changed in place.
        decoding: the settings; the number of the question is added to the seed.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        _note("Type a message, or /help.")
    while True:
        line = _read_line("> " if interactive else "")
        if line is None:
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            question = _command(line, session)
            if question == "exit":
                return
            if not isinstance(question, Message):
                continue
        else:
            question = Message("user", line)
        _ask(answer, session, question, decoding)


def _enable_line_editing() -> None:
    """Arrow keys and history, where the platform has readline."""
    try:
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:  # Windows' console edits lines by itself
        return


def _read_line(prompt: str) -> str | None:
    """A line of input; None at its end."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            _note("\n/exit leaves.")
        except UnicodeDecodeError:
            _note("That was not UTF-8 text.")


def _ask(
    answer: Callable[[Sequence[int], Decoding], Answer], session: ChatSession, question: Message, decoding: Decoding
) -> None:
    """Put a question, show the answer as it comes, keep both."""
    session.turns.append(question)
    dropped = session.dropped
    try:
        ids = session.prompt(decoding.max_new_tokens)
        stream = answer(ids, replace(decoding, seed=decoding.seed + session.asked))
    except UserError as error:
        session.undo()
        _note(str(error))
        return
    if session.dropped > dropped:
        _note("[the context is full: the oldest turns were dropped]")
    try:
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _note("[stopped; the answer so far is kept]")
    session.turns.append(Message("assistant", stream.text))
    session.asked += 1


def _command(line: str, session: ChatSession) -> Message | str | None:
    """Obey a command; returns a question to ask again, "exit", or None."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return "exit"
    if name == "/help":
        _note(HELP)
    elif name == "/system":
        if rest:
            session.system_prompt = rest
            session.turns.clear()
        _note(f"[system: {'none, as the template has it' if session.system_prompt is None else session.system_prompt}]")
    elif name == "/clear":
        session.turns.clear()
        _note("[cleared]")
    elif name == "/retry":
        question = session.undo()
        if question is None:
            _note("[nothing to retry]")
        return question
    elif name == "/undo":
        _note("[nothing to undo]" if session.undo() is None else "[taken back]")
    elif name == "/save":
        _save(rest, session)
    else:
        _note(f"{name} is no command; /help lists them.")
    return None


def _save(name: str, session: ChatSession) -> None:
    if not name:
        _note("/save needs a file name.")
        return
    turns = [{"role": message.role, "content": message.content} for message in session.messages()]
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        _note(f"[added to {name}]")
    except OSError as error:
        _note(f"{name}: cannot be written: {error.strerror}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
