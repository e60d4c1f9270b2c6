"""Chats in files: added as a line that can be trained on, read back from any file of conversations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from qingtune.data.format import Conversation, FileFacts, Message, conversations_of
from qingtune.data.read import Fault
from qingtune.errors import UserError
from qingtune.files.write import open_in_place

SUFFIX = ".jsonl"


def path_of(name: str) -> str:
    """The file that a name typed in a chat means; without an ending it gets that of JSON lines.

    Raises:
        UserError: no file can have this name.
    """
    if "\0" in name:
        raise UserError("a file name cannot contain NUL")
    path = os.path.expanduser(name)
    return path if os.path.splitext(path)[1] or os.path.isdir(path) else f"{path}{SUFFIX}"


def add_conversation(path: str, messages: Sequence[Message]) -> None:
    """Add a line to a file of conversations, whole or not at all; the file is made if need be.

    Raises:
        UserError: the file is of another kind or form, or cannot be written.
    """
    if not path.endswith(SUFFIX):
        raise UserError("chats are saved as JSON lines", where=path, fix=f"Use a file name that ends in {SUFFIX}.")
    form = _form_of(path)
    if form not in ("", "messages"):
        raise UserError(f'its rows are of the form "{form}", and a file has one form', where=path, fix="Name another.")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    line = json.dumps({"messages": turns}, ensure_ascii=False).encode() + b"\n"
    try:
        with open_in_place(Path(path), append=True) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                while line:
                    line = line[file.write(line) or 0 :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=path) from None


def _form_of(path: str) -> str:
    """The form of a file's rows; empty without a row; a UserError for other content, as a hard link may have."""
    if not os.path.exists(path):
        return ""
    about = FileFacts()
    if form := next((about.format for _ in conversations_of(path, None, about) if about.format), None):
        return form
    if os.path.isfile(path) and os.path.getsize(path):
        raise UserError("it has no readable conversation", where=path, fix="Name another.")
    return ""


def read_conversation(path: str, line: int | None) -> tuple[Conversation, list[Fault]]:
    """A conversation of a file in any form that can be trained on, and the faults of other rows.

    Args:
        line: the line on which it starts (Parquet: the row); None for the last one.

    Raises:
        UserError: the file or the row cannot be used.
    """
    chosen: Conversation | Fault | None = None
    faults: list[Fault] = []
    for row in conversations_of(path, None, FileFacts()):
        if isinstance(row, Fault):
            faults.append(row)
        if line is None or row.origin == f"{path}:{line}":
            chosen = row
    if chosen is None:
        raise UserError(
            "no conversation here" if line is None else f"no conversation starts on line {line}", where=path
        )
    if isinstance(chosen, Fault):
        raise UserError(chosen.reason, where=chosen.origin, fix="/load FILE LINE loads another one.")
    if chosen.text is not None:
        raise UserError("plain text, not a conversation", where=chosen.origin)
    return chosen, faults
