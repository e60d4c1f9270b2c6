"""A process with limits for the work of strangers: chat templates, and tokenizers that might never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# All of the environment that the process gets to see; tokens and passwords are not among it.
_PASSED_ON = ("PATH", "SYSTEMROOT", "LANG", "TZ")


class Worker:
    """The process; it ends when this one does, since its input ends then.

    Args:
        script: answers each line of JSON with another; says `ready` first.
        seconds: that an answer may take, after which the process ends itself.
        needs: the library that the script imports.
    """

    def __init__(self, script: Path, seconds: float, needs: str) -> None:
        self._one_at_a_time = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{script} does not start with {sys.executable}; is {needs} installed there?")

    def ask(self, request: Mapping[str, object]) -> Any:
        """Send a request and wait for its answer; None if the process ended over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_at_a_time:
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                return None
            line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None
