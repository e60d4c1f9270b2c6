"""A process with limits for the work of strangers: chat templates, and tokenizers that might never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

SCRIPT = Path(__file__).with_name("worker_process.py")
# All of the environment that the process gets to see; tokens and passwords are not among it.
_PASSED_ON = ("PATH", "SYSTEMROOT", "LANG", "TZ")


class Worker:
    """The process, started for the first request and again after one that it did not answer.

    It ends when this one does, since its input ends then.

    Args:
        work: what it is for.
        seconds: that an answer may take, after which the process ends itself.
        opening: a request that comes before all others, answered by `{}`.
    """

    def __init__(
        self, work: Literal["templates", "tokenizer"], seconds: float, opening: Mapping[str, object] | None = None
    ) -> None:
        self._command = [sys.executable, "-I", str(SCRIPT), work, str(seconds)]
        self._opening = opening
        self._one_at_a_time = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, object]) -> Any:
        """Send a request and wait for its answer; None if the process ended over it."""
        with self._one_at_a_time:
            process, self._process = self._process, None  # until it has answered, as Ctrl-C may come before that
            if process is None:
                process = self._start()
                if self._opening and (answer := _exchange(process, self._opening)) != {}:
                    return answer
            answer = _exchange(process, request)
            if answer is not None:
                self._process = process
            return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{SCRIPT} does not start with {sys.executable}; is jinja2 installed there?")
        return process


def _exchange(process: subprocess.Popen[bytes], request: Mapping[str, object]) -> Any:
    """The answer to a request; None if the process ended over it."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None
