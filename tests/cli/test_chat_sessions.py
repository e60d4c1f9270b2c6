"""The chat on a real pseudo-terminal, as a person sits at it; and on a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fork_server import ForkServer, start_python

Start = Callable[..., Any]
ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")

# A model that counts slowly and for long, and thinks first when asked why.
COUNTING = """
import sys, time
sys.path.insert(0, "tests")
from conftest import make_tokenizer
from qingtune.answering.chat.talk import chat
from qingtune.answering.chat.session import ChatSession
from qingtune.data.tokenize import make_template
from qingtune.answering.generate import Answer, Decoding
template = make_template(make_tokenizer(), [2])
def answer(ids, decoding):
    question = template.tokenizer.decode(list(ids)).rpartition("user\\n")[2].partition("<")[0]
    text = "<think>hmm</think>Because." if question == "why?" else f"You said {question!r}."
    def tokens():
        yield from template.tokenizer(text)["input_ids"]
        for number in range(10**6 if question == "count" else 0):
            time.sleep(0.01)
            yield from template.tokenizer(f" {number}")["input_ids"]
        yield 2
    return Answer(template, tokens())
chat(answer, ChatSession(template, 4000), Decoding())
"""


class Terminal:
    """A process on a pseudo-terminal of its own, of 24 lines and 80 columns.

    Args:
        start: starts Python with arguments on streams, in a session.
    """

    def __init__(self, start: Start, argv: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(slave)
        environment = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
        self.process = start(*argv, streams=(slave, slave, slave), session=True, **environment)
        self._slave = slave
        self.seen = self.all_seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What is shown up to a text, without escape sequences; then it is forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.seen!r}"
            shown = os.read(self._master, 65536).decode(errors="replace")
            self.all_seen += shown
            self.seen = _ESCAPES.sub("", self.seen + shown)
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def ask(self, message: str) -> None:
        """Type a message at the prompt and send it."""
        self.wait_for(">")
        self.type(message + ENTER)

    def wait_for_end(self) -> int:
        """The exit code; and the terminal is as it was before."""
        code = self.process.wait(60)
        assert termios.tcgetattr(self._slave) == self.modes
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def open_terminal(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """A function that starts Python at a terminal: forked, or as a new process."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    opened: list[Terminal] = []

    def start(*argv: str | Path, new: bool = False, **environment: str) -> Terminal:
        opened.append(Terminal(start_python if new else fork_server.start, argv, environment))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_conversation_at_a_terminal(open_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    terminal = open_terminal("-c", COUNTING, QINGTUNE_CACHE=str(tmp_path))
    terminal.wait_for("Type a message, or /help.")
    terminal.ask("你好")
    terminal.wait_for("You said '你好'.\r\n")
    terminal.ask("\x1b[200~one\ntwo\x1b[201~")
    terminal.wait_for("You said 'one\\ntwo'.\r\n")
    terminal.ask("why?")
    assert "hmm" not in terminal.wait_for("thinking… 3 characters\r\nBecause.\r\n")
    terminal.ask("count")
    terminal.wait_for(" 0 1 2 3")
    terminal.type("typed meanwhile")
    terminal.wait_for(" 30")
    terminal.type(CTRL_C)  # forgets what was typed, as it does in a shell
    terminal.wait_for("[stopped; the answer so far is kept]")
    assert "typed" not in terminal.all_seen
    terminal.ask("count")
    terminal.wait_for(" 0 1 2 3")
    terminal.type(CTRL_C)
    terminal.wait_for("[stopped; the answer so far is kept]")
    terminal.ask("/undo")
    terminal.wait_for("[taken back]")
    terminal.ask("half a line" + CTRL_C)
    terminal.wait_for("[Press Ctrl-C again to exit; /exit and Ctrl-D exit, too]")
    terminal.ask(f"/save {saved}")
    terminal.wait_for("chat.jsonl")
    terminal.wait_for("with the thinking]")
    terminal.wait_for(">")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    turns = [turn["content"] for turn in json.loads(saved.read_text(encoding="utf-8"))["messages"]]
    assert turns[:6] == [
        "你好", "You said '你好'.", "one\ntwo", "You said 'one\\ntwo'.", "why?", "<think>hmm</think>Because."
    ]  # fmt: skip
    assert turns[6] == "count"
    assert re.fullmatch(r"You said 'count'\.( \d+){4,}( \d*)?", turns[7])
    assert len(turns) == 8


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=["dumb", "no colour"])
def test_a_terminal_of_plain_lines(
    open_terminal: Callable[..., Terminal], tmp_path: Path, environment: dict[str, str]
) -> None:
    terminal = open_terminal("-c", COUNTING, QINGTUNE_CACHE=str(tmp_path), **environment)
    terminal.ask("one\\")
    terminal.wait_for("... ")
    terminal.type("two" + ENTER)
    terminal.wait_for("You said 'one\\ntwo'.\r\n")
    terminal.ask("why?")
    assert "thinking" not in terminal.wait_for("Because.\r\n")
    terminal.ask("count")
    terminal.wait_for(" 0 1 2 3")
    terminal.type(CTRL_C)
    terminal.wait_for("[stopped; the answer so far is kept]")
    terminal.ask("/exit")
    assert terminal.wait_for_end() == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "native"] == []


def test_the_command_at_a_terminal(
    open_terminal: Callable[..., Terminal], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    argv = ("-m", "qingtune", "chat", "--base_model", tiny(), "--max_new_tokens", "12", "--seed", "1")
    terminal = open_terminal(*argv, new=True, QINGTUNE_CACHE=str(tmp_path))
    terminal.ask("/set stats on")
    terminal.wait_for("stats  on")
    terminal.ask("Fresh bread?")
    first = terminal.wait_for("tokens/s]")
    terminal.ask("/undo")
    terminal.ask("/set seed 1")
    terminal.ask("Fresh bread?")
    again = terminal.wait_for("tokens/s]")
    one, other = (re.search(r"([^\r\n]+)\r\n\[\d+ tokens in", shown) for shown in (first, again))
    assert one
    assert other
    assert one[1] == other[1]
    terminal.ask("/set temperature hot")
    terminal.wait_for('"temperature" is "hot": should be a valid number')
    terminal.ask("/exit")
    assert terminal.wait_for_end() == 0
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600


LOADED = """
import atexit, runpy, sys
atexit.register(lambda: print("editor:", "prompt_toolkit" in sys.modules, file=sys.stderr))
sys.argv = ["qingtune", *sys.argv[1:]]
runpy.run_module("qingtune", run_name="__main__")
"""


def test_a_pipe_gets_answers_alone_and_loads_no_editor(tiny: Callable[..., Path], tmp_path: Path) -> None:
    argv = ("-c", LOADED, "chat", "--base_model", tiny(), "--max_new_tokens", "4", "--temperature", "0")
    ended: Any = subprocess.run(
        [sys.executable, *map(str, argv)], input="Bread?\n/set stats on\n//help\n/zzz", cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=False, env={**os.environ, "QINGTUNE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "> " not in ended.stderr
    assert "tokens in" in ended.stderr
    assert "/zzz is not a command" in ended.stderr
    assert ended.stderr.endswith("editor: False\n")
    assert "tokens" not in ended.stdout
    assert len(ended.stdout.splitlines()) >= 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "native"] == []
