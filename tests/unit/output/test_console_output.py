"""Nothing that is shown steers a terminal, answers stay as they are, and faults of streams are noted."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import ROOT
from rich.progress import Progress

from qingtune.cli import main
from qingtune.errors import UserError
from qingtune.output import console as output
from qingtune.output.console import OutputClosed, console, give, guarded_output, lost_output, safe, say, show

TRICK = "a\x1b]52;c;ZXZpbA==\x07b\x9b2J\x7f\u202ec\u2066\u2028d\te\r\nf\rg\n"
SHOWN = "a\\x1b]52;c;ZXZpbA==\\x07b\\x9b2J\\x7f\\u202ec\\u2066\\u2028d\te\nf\\x0dg\n"


class Terminal(io.StringIO):
    """What a terminal is given."""

    def isatty(self) -> bool:
        return True


class Notebook:
    """A stream such as ipykernel's: no descriptor, no encoding, no terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


Replace = Callable[[str, Any], None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    return lambda name, stream: monkeypatch.setattr(sys, name, stream)


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", encoding="utf-8")
    yield stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    stream.close()


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A disk that takes no more."""
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's full device")
    stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    yield stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stream.close()


# --- What steers a terminal ------------------------------------------------------------------------------------------


def test_what_could_steer_a_terminal_is_shown_as_its_number() -> None:
    assert safe(TRICK) == SHOWN
    assert safe(SHOWN) == SHOWN
    assert safe("日本語 🥖 é\u0301\u200d") == "日本語 🥖 é\u0301\u200d"
    left = [code for code in range(0x3000) if chr(code) in safe(f"{chr(code)}") and not chr(code).isprintable()]
    assert {9, 10}.issubset(left)
    assert not [code for code in left if code < 32 and code not in (9, 10)]


def test_messages_are_made_safe_wherever_they_go(replace: Replace) -> None:
    for stream in (io.StringIO(), Terminal()):
        replace("stderr", stream)
        replace("stdout", stream)
        say(TRICK)
        show(TRICK)
        assert stream.getvalue() == f"{SHOWN}\n" * 2


def test_what_was_asked_for_is_as_it_is_but_on_a_terminal(replace: Replace) -> None:
    for stream, expected in ((io.StringIO(), TRICK), (Terminal(), SHOWN.replace("\\x0d", ""))):
        replace("stdout", stream)
        give(TRICK, end="")
        assert stream.getvalue() == expected


def test_what_libraries_print_is_made_safe_but_bars_move(replace: Replace) -> None:
    stream = Terminal()
    replace("stderr", stream)
    with guarded_output():
        print("x\x1b[2Jy", file=sys.stderr)
        print("\r 50 %\x1b[A\x1b[31m", file=sys.stderr, end="")
    assert "x\\x1b[2Jy" in stream.getvalue()
    assert stream.getvalue().endswith("\r 50 %\x1b[A\\x1b[31m")


def test_bars_of_ours_are_drawn(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    replace("stderr", stream)
    with guarded_output(), Progress(console=console()) as bar:
        bar.update(bar.add_task("x", total=2), completed=1)
        say("in between\x1b[2J")
    assert "\x1b[" in stream.getvalue()
    assert "in between\\x1b[2J" in stream.getvalue()
    assert "\\x1b[?25l" not in stream.getvalue()


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "--data", "x\x1b]0;t\x07.jsonl"],
        ["x\x1b[2J"],
        ["train", "--lora_r", "\x1b[2J", "--\x1b[31m", "x"],
        ["infer", "--base_model", "no\x1b[2J\u202e"],
        ["plan", "--model_name_or_path", "no\u2028\x9b2J"],
    ],
)
def test_no_argument_steers_through_a_message(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert safe(out + err) == out + err
    assert "\\x1b" in err or "\\u2028" in err


# --- Streams that fail -----------------------------------------------------------------------------------------------


def test_progress_that_cannot_be_told_is_noted_once(
    unread: TextIO, full: TextIO, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream, reason in ((unread, "Broken pipe"), (full, "No space left on device")):
        replace("stderr", stream)
        with guarded_output():
            for _ in range(3):
                say("x" * 10_000)
                print("from a library", file=sys.stderr)
                console().print("drawn")
            assert lost_output() == [f"stderr: {reason}"]
        stream.flush()  # as Python does at its end; the guard let go of what could not be written
    assert capsys.readouterr().out == ""


def test_room_that_comes_back_is_used(replace: Replace) -> None:
    class Disk(io.StringIO):
        room = False

        def write(self, text: str) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    replace("stderr", disk)
    with guarded_output():
        say("lost")
        disk.room = True
        say("kept")
    assert disk.getvalue() == "kept\n"


def test_what_was_asked_for_and_cannot_be_written_ends_the_command(
    unread: TextIO, full: TextIO, replace: Replace
) -> None:
    replace("stdout", unread)
    with guarded_output(), pytest.raises(OutputClosed):
        give("x")
    replace("stdout", full)
    with guarded_output(), pytest.raises(UserError, match=r"stdout: cannot be written \(No space left on device\)"):
        give("x")


def test_a_result_in_files_that_cannot_be_shown_is_told_once(
    full: TextIO, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("stdout", full)
    with guarded_output():
        show("x")
        show("y")
    assert capsys.readouterr().err.count("Warning: stdout: cannot be written") == 1


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["check", "--data", "{data}"], ["train", "--help"]])
def test_exit_codes_of_what_is_on_stdout_alone(
    argv: list[str], data_file: Path, unread: TextIO, full: TextIO, replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(data=data_file) for word in argv]
    replace("stdout", full)
    assert main(words) in (1, 2)
    replace("stdout", unread)
    assert main(words) == (1 if argv[0] == "train" else 141)
    replace("stdout", None)
    assert main(words) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_closed_streams_of_python(replace: Replace) -> None:
    closed = io.StringIO()
    closed.close()
    replace("stderr", closed)
    with guarded_output():
        assert not sys.stderr.isatty()
        say("x")
        assert lost_output() == ["stderr: I/O operation on closed file"]


def test_a_notebooks_streams_are_enough(replace: Replace) -> None:
    stream = Notebook()
    replace("stdout", stream)
    replace("stderr", stream)
    assert main(["--version"]) == 0
    assert main(["nonsense"]) == 2
    assert stream.text.startswith("qingtune ")
    assert 'error: "nonsense" is not a command' in stream.text


def test_nested_guards_are_one(replace: Replace) -> None:
    stream = io.StringIO()
    replace("stderr", stream)
    with guarded_output():
        outer = sys.stderr
        with guarded_output():
            assert sys.stderr is outer
        assert sys.stderr is outer
    assert sys.stderr is stream


def test_standard_streams_that_are_closed_are_opened_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = os.dup(1)
    try:
        os.close(1)
        output.open_standard_streams()
        assert os.path.samestat(os.fstat(1), os.stat(os.devnull))
        assert os.get_inheritable(1)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    monkeypatch.setattr(sys, "stdin", None)
    output.open_standard_streams()
    assert sys.stdin.read() == ""


@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), RuntimeError("can't start new thread")]
)
def test_a_limit_of_processes_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr("qingtune.commands.check.check", fail)
    assert main(["check", "--data", "x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the system does not allow this user more processes or threads. "
        "Raise the limit (ulimit -u), or end other programs."
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("streams", "code"), [("0<&- 1>&- 2>&-", 2), ("0<&- 2>&-", 0), ("| true; exit ${PIPESTATUS[0]}", 141)]
)
def test_a_process_without_streams(streams: str, code: int, data_file: Path) -> None:
    command = f"{sys.executable} -m qingtune check --data {data_file} {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def test_a_panic_of_a_library_passes_through_the_guard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PanicException(BaseException):
        """As Rust's panics come to Python."""

    def fail(*_: object) -> int:
        raise PanicException("planted-secret-7 \x1b[2J")

    monkeypatch.setenv("HF_TOKEN", "planted-secret-7")
    monkeypatch.setattr("qingtune.commands.check.check", fail)
    assert main(["check", "--data", "x"]) == 1
    told = capsys.readouterr().err
    assert "PanicException: *** \\x1b[2J" in told
