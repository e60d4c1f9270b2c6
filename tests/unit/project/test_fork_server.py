"""What the fork server forks behaves as a new process of Python does, and nothing outlives the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULES, ROOT
from fork_server import ForkServer, start_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
SEEN = "print(sys.argv, sys.orig_argv[1:], __name__, os.getcwd(), os.environ.get('A'), input())"
CODES = {
    "an end": f"import os, sys; {SEEN}",
    "an exit code": f"import os, sys; {SEEN}; sys.exit(3)",
    "a message": "import sys; sys.exit('refused')",
    "an error": "1 / 0",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "an action at the end": "import atexit; atexit.register(print, 'done')",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    started = ForkServer(loaded=False)
    yield started
    started.close()


def results(start: Callable[..., Any], folder: Path, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, and the last line of the errors, as tracebacks hold the lines of what forked."""
    (folder / "in").write_text("typed\n")
    with (folder / "in").open() as given, (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        code = start(*arguments, streams=(given, out, err), A="b").wait(60)
    return code, (folder / "out").read_text(), "".join((folder / "err").read_text().splitlines()[-1:])


@pytest.mark.parametrize("name", CODES)
def test_code_does_what_it_does_in_a_new_process(name: str, server: ForkServer, tmp_path: Path) -> None:
    arguments = ("-c", CODES[name], "--flag", "x y")
    assert results(server.start, tmp_path, *arguments) == results(start_python, tmp_path, *arguments)


def test_scripts_and_modules_do_too(server: ForkServer, tmp_path: Path) -> None:
    for arguments in (("-m", "qingtune", "--help"), ("fine_tune_qwen.py", "--lora_rnak", "8")):
        assert results(server.start, tmp_path, *arguments) == results(start_python, tmp_path, *arguments)


TESTS = """
import subprocess, sys, time
from fork_server import ForkServer
server = ForkServer(loaded=False)
nothing = subprocess.DEVNULL
child = server.start("-c", "import time; time.sleep(600)", streams=(nothing, nothing, nothing))
print(server._server.pid, child.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_tests_that_are_killed() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), MODULES))}
    tests = subprocess.Popen([sys.executable, "-c", TESTS], env=env, stdout=subprocess.PIPE, text=True)
    assert tests.stdout is not None
    started = [int(number) for number in tests.stdout.readline().split()]
    assert all(runs(number) for number in started)
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    until = time.monotonic() + 60
    while any(runs(number) for number in started) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(runs(number) for number in started)


def runs(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return " Z " not in Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False
