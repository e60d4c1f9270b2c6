"""Keys become messages, of one line or several, from the history, completed; the history is kept for later chats."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qingtune.answering.chat import editor
from qingtune.answering.chat.editor import EditedLines
from qingtune.answering.chat.lines import LEAVING, PlainLines, terminal_kind
from qingtune.errors import UserError

ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_J, CTRL_R, TAB, UP = "\r", "\x1b\r", "\x03", "\x04", "\n", "\x12", "\t", "\x1b[A"
PAUSE = ""  # among keys: what was typed before has its effect first


class Keyboard:
    """Types at an editor of its own."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.notes: list[str] = []
        self.lines = EditedLines(self.notes.append)

    def type(self, *keys: str, recorded: bool = True) -> str | None:
        def press() -> None:
            for key in keys:
                time.sleep(0.3 if key == PAUSE else 0)
                self._pipe.send_text(key)

        thread = threading.Thread(target=press)
        thread.start()
        try:
            return self.lines.read(recorded=recorded)
        finally:
            thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QINGTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def keyboard(cache: Path) -> Iterator[Keyboard]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield Keyboard(pipe)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["hello", ENTER], "hello"),
        (["a", ALT_ENTER, "b", CTRL_J, "c", ENTER], "a\nb\nc"),
        (["a\\", ENTER, "b", ENTER], "a\nb"),
        (["a\\b", ENTER], "a\\b"),
        (["a\\", "\x1b[D", ENTER], "a\\"),  # the backslash is not before the cursor
        (["\x1b[200~one\r\n\ttwo\nthree\n\x1b[201~", ENTER], "one\n\ttwo\nthree"),
        (["你好，世界", "\x7f\x7f", "吗？", ENTER], "你好，吗？"),
        (["world", "\x01", "hello ", ENTER], "hello world"),
        (["", ENTER], ""),
        (["/ret", TAB, PAUSE, ENTER], "/retry"),
        (["/set temp", TAB, PAUSE, " 0.5", ENTER], "/set temperature 0.5"),
        (["/set thinking s", TAB, PAUSE, ENTER], "/set thinking show"),
        (["say /ret", TAB, PAUSE, ENTER], "say /ret"),
        (["/set temperature h", TAB, PAUSE, ENTER], "/set temperature h"),
    ],
)
def test_keys_become_a_message(keyboard: Keyboard, keys: list[str], message: str) -> None:
    assert keyboard.type(*keys) == message
    assert keyboard.notes == []


def test_enter_takes_a_chosen_completion_before_it_sends(keyboard: Keyboard, tmp_path: Path) -> None:
    (tmp_path / "my chats.jsonl").touch()
    (tmp_path / "my other.jsonl").touch()
    keys = [f"/load {tmp_path}/my", TAB, PAUSE, TAB, PAUSE, ENTER, " 2", ENTER]
    assert keyboard.type(*keys) == f"/load {tmp_path}/my chats.jsonl 2"


def test_history_by_arrow_and_by_search(keyboard: Keyboard) -> None:
    for message in ("the first one", "two\nlines", "第三条"):
        keyboard.type(message.replace("\n", CTRL_J), ENTER)
    assert keyboard.type(UP, ENTER) == "第三条"
    assert keyboard.type(CTRL_R, "FIRST", ENTER, "\x05 again", ENTER) == "the first one again"
    assert keyboard.type(CTRL_R, "lin", ENTER, ENTER) == "two\nlines"
    assert keyboard.type(CTRL_R, "条", ENTER, ENTER) == "第三条"
    assert keyboard.type(CTRL_R, "first", CTRL_C, "new", ENTER) == "new"  # the search is left, nothing else


@pytest.mark.parametrize(
    ("keys", "message", "notes"),
    [
        ([CTRL_D], None, 0),
        (["ab", "\x01", CTRL_D, ENTER], "b", 0),  # deletes where there is text
        (["abc", CTRL_C, "def", ENTER], "def", 1),
        ([CTRL_C, "def", ENTER], "def", 1),
        ([CTRL_C, CTRL_C], None, 1),
        (["abc", CTRL_C, CTRL_C], None, 1),
        (["abc", CTRL_C, "d", CTRL_C, "e", ENTER], "e", 2),
    ],
)
def test_leaving(keyboard: Keyboard, keys: list[str], message: str | None, notes: int) -> None:
    assert keyboard.type(*keys) == message
    assert keyboard.notes == [LEAVING] * notes


def test_leaving_takes_two_presses_at_one_prompt(keyboard: Keyboard) -> None:
    assert keyboard.type(CTRL_C, "a", ENTER) == "a"
    assert keyboard.type(CTRL_C, "b", ENTER) == "b"


# --- The file of the history -----------------------------------------------------------------------------------------


def test_history_is_kept_for_the_next_chat_and_for_no_one_else(keyboard: Keyboard, cache: Path) -> None:
    keyboard.type("one", ENTER)
    keyboard.type("two\\", ENTER, "行", ENTER)
    file = cache / "chat_history"
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == ["one", "two\n行"]
    assert "行" in file.read_text(encoding="utf-8")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        later = Keyboard(pipe)
        assert later.type(PAUSE, UP, UP, UP, ENTER) == "one"  # through both lines of the second
    assert file.stat().st_mode & 0o777 == 0o600


def test_history_can_be_switched_off(keyboard: Keyboard, cache: Path) -> None:
    keyboard.type("a secret", ENTER, recorded=False)
    assert not cache.exists()
    assert keyboard.type(UP, ENTER, recorded=False) == "a secret"  # within this chat it is there


def test_a_history_that_cannot_be_written_is_told_once(keyboard: Keyboard, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert keyboard.type("one", ENTER) == "one"
    assert keyboard.type("two", ENTER) == "two"
    (note,) = keyboard.notes
    assert note.startswith(f"{cache / 'chat_history'}: ")
    assert note.endswith("; your input is not kept for later chats.")
    assert keyboard.type(UP, UP, ENTER) == "one"


def test_a_broken_history_is_read_as_far_as_it_goes(keyboard: Keyboard, cache: Path) -> None:
    cache.mkdir()
    (cache / "chat_history").write_bytes(b'"one"\n{\n7\n"\xff"\n"two"\n"half a li')
    assert keyboard.type(PAUSE, UP, UP, ENTER) == "one"
    (cache / "chat_history").unlink()


def test_a_long_history_is_shortened(keyboard: Keyboard, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor, "KEPT", 3)
    cache.mkdir()
    file = cache / "chat_history"
    file.write_text("".join(f'"{number}"\n' for number in range(7)))
    assert keyboard.type(PAUSE, UP, UP, UP, UP, ENTER) == "4"
    assert file.read_text() == '"4"\n"5"\n"6"\n"4"\n'
    assert [path.name for path in cache.iterdir()] == ["chat_history"]


# --- Without the editor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "stdout", "environment", "kind"),
    [
        (True, True, {}, "full"),
        (True, True, {"TERM": "dumb"}, "plain"),
        (True, True, {"NO_COLOR": "1"}, "plain"),
        (True, False, {}, "plain"),
        (False, True, {}, "none"),
        (False, False, {}, "none"),
    ],
)
def test_which_kind_of_terminal(
    monkeypatch: pytest.MonkeyPatch, stdin: bool, stdout: bool, environment: dict[str, str], kind: str
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin.isatty", lambda: stdin, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: stdout, raising=False)
    assert terminal_kind() == kind


def plain(monkeypatch: pytest.MonkeyPatch, typed: list[Any], *, prompted: bool) -> tuple[list[str | None], list[str]]:
    """What is read until the end, and the notes."""

    def line(prompt: str) -> str:
        item = typed.pop(0) if typed else EOFError()
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", line)
    notes: list[str] = []
    lines = PlainLines(notes.append, prompted=prompted)
    read: list[str | None] = []
    while not read or read[-1] is not None:
        read.append(lines.read(recorded=True))
    return read, notes


def test_plain_lines_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    no_text = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    typed = ["one", "a\\", "b", no_text, "two", "half\\", KeyboardInterrupt(), "three", "end\\"]
    read, notes = plain(monkeypatch, typed, prompted=True)
    assert read == ["one", "a\nb", "two", "three", "end\n", None] or read == [
        "one",
        "a\nb",
        "two",
        "three",
        "end",
        None,
    ]
    assert notes == ["That was not UTF-8 text.", f"\n{LEAVING}"]
    read, _ = plain(monkeypatch, [KeyboardInterrupt(), KeyboardInterrupt(), "never read"], prompted=True)
    assert read == [None]


def test_lines_of_a_pipe_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain(monkeypatch, ["one\\", "", "two"], prompted=False)[0] == ["one\\", "", "two", None]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX terminals")
def test_keys_stay_unseen_after_the_shell_had_the_terminal(keyboard: Keyboard, monkeypatch: pytest.MonkeyPatch) -> None:
    import termios

    master, slave = os.openpty()
    monkeypatch.setattr("os.tcgetpgrp", lambda _: os.getpgrp())
    with open(slave, encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        as_in_shell = termios.tcgetattr(terminal)
        with keyboard.lines.quiet():
            termios.tcsetattr(terminal, termios.TCSANOW, as_in_shell)  # Ctrl-Z, then fg
            os.kill(os.getpid(), signal.SIGCONT)
            assert not termios.tcgetattr(terminal)[3] & termios.ECHO
        assert termios.tcgetattr(terminal) == as_in_shell
    os.close(master)


def test_a_stdin_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^stdin: cannot be read \(Is a directory\)"):
        plain(monkeypatch, ["one", IsADirectoryError(21, "Is a directory")], prompted=False)
