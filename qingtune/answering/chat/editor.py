"""The line editor of the chat: several lines a message, history with search, completion of commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor

from qingtune.answering.chat.commands import COMMANDS, settable
from qingtune.answering.chat.lines import LEAVING
from qingtune.config.commands import ChatOptions
from qingtune.config.flags import value_of
from qingtune.errors import UserError
from qingtune.files.paths import default_cache
from qingtune.files.write import open_in_place, replacing
from qingtune.machine.signals import handled

PRIVATE = 0o600  # permissions of a file that only its owner can read and write
KEPT = 1000  # messages of the history; twice as many are in the file at most


class EditedLines:
    """Messages typed at a terminal: Enter sends, Alt+Enter, Ctrl-J or a backslash at the end makes a new line."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._history = SavedHistory(default_cache() / "chat_history")
        self._session: PromptSession[str] = PromptSession(
            [("", "\n"), ("bold", "> ")],
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=self._history,
            search_ignore_case=True,
            completer=CommandCompleter(),
            complete_while_typing=False,
            enable_suspend=True,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
        )

    def read(self, *, recorded: bool) -> str | None:
        """The next message; None after Ctrl-D, or Ctrl-C twice."""
        self._history.recording = recorded
        interrupted = False
        while True:
            try:
                text = self._session.prompt().rstrip("\n")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if interrupted and not self._session.default_buffer.text:
                    return None
                self._note(LEAVING)
                interrupted = True
                continue
            if self._history.fault:
                self._note(self._history.fault)
                self._history.fault = ""
            return text

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Keep what is typed for the next message, without showing it; Ctrl-C stays Ctrl-C."""
        if sys.platform == "win32" or not sys.stdin.isatty():  # Windows' console shows nothing that is not read
            yield
            return
        import termios

        before = termios.tcgetattr(sys.stdin)
        silent = termios.tcgetattr(sys.stdin)
        silent[0] &= ~termios.ICRNL  # Enter stays Enter
        silent[3] &= ~(termios.ECHO | termios.ICANON)

        def silence(*_: object) -> None:
            with suppress(OSError, termios.error):  # a terminal that hangs up sends SIGCONT too
                shown = termios.tcgetattr(sys.stdin)[3] & termios.ECHO
                if shown and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
                    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)

        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        with handled([signal.SIGCONT], silence):  # after Ctrl-Z and fg the terminal is as the shell had it
            try:
                yield
            finally:
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not in a search, where Enter takes what was found

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # the completion is taken, and its argument can follow
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-j", filter=typing)
    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Completes commands, names and values of /set, and files of /save and /load."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What can stand at the cursor."""
        text = document.text_before_cursor
        words = text.split(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if words[0] in ("/save", "/load") and len(words) > 1:
            name = Document(text.partition(" ")[2])
            yield from PathCompleter(expanduser=True).get_completions(name, complete_event)
            return
        for choice in _choices(words[:-1]):
            if choice.startswith(words[-1]):
                yield Completion(choice, start_position=-len(words[-1]))


def _choices(before: list[str]) -> list[str]:
    """What can follow these words."""
    if not before:
        return [command.name for command in COMMANDS]
    if before == ["/set"]:
        return list(settable())
    if before[0] == "/set" and len(before) == 2 and before[1] in ChatOptions.model_fields:
        return value_of(ChatOptions.model_fields[before[1]]).split("|")
    return []


class SavedHistory(History):
    """What was typed in this chat and earlier ones: a JSON text a line, in a file that only its owner can read.

    Attributes:
        recording: whether what is typed goes to the file.
        fault: why that failed, for the user; nothing more is written then.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.recording = True
        self.fault = ""
        self._broken = False

    def load_history_strings(self) -> Iterable[str]:
        """The messages of the file, newest first; other lines are skipped."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
            if len(lines) > 2 * KEPT:
                with replacing(self._path, PRIVATE) as file:
                    file.write(b"".join(line + b"\n" for line in lines[-KEPT:]))
        except FileNotFoundError:
            return
        except (OSError, UserError) as error:
            self._fail(error)
            return
        for line in reversed(lines[-KEPT:]):
            try:
                text = json.loads(line)
            except ValueError:
                continue
            if isinstance(text, str):
                yield text

    def store_string(self, string: str) -> None:
        """Add a message to the file."""
        if not self.recording or self._broken:
            return
        line = json.dumps(string, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open_in_place(self._path, append=True, mode=PRIVATE) as file:
                os.chmod(self._path, PRIVATE)  # one that was there may have been open to others
                file.write(line)
        except (OSError, UserError) as error:
            self._fail(error)

    def _fail(self, error: OSError | UserError) -> None:
        self._broken = True
        reason = error.what if isinstance(error, UserError) else error.strerror or str(error)
        self.fault = f"{self._path}: {reason}; your input is not kept for later chats."
