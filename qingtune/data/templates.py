"""Chat templates, which come with models and are code of strangers, rendered in a process of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 10.0  # that a conversation may take; a usual one takes a ten-thousandth
# All of the environment that the process gets to see; tokens and passwords are not among it.
_PASSED_ON = ("PATH", "SYSTEMROOT", "LANG", "TZ")


class TemplateError(Exception):
    """A chat template that cannot be rendered; says why."""


def render_template(
    template: str, variables: Mapping[str, str], messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """A conversation as the template writes it.

    Args:
        template: Jinja.
        variables: the tokenizer's special tokens by name.
        messages: each with role and content.
        add_generation_prompt: whether to end with what stands before an answer.

    Raises:
        TemplateError: the template is broken, refuses the messages, or takes too long or too much memory.
    """
    request = {
        "template": template, "variables": dict(variables), "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }  # fmt: skip
    try:
        answer = _worker().ask(request)
    except BaseException:  # Ctrl-C, above all: the answer is still to come, and the next one to ask would get it
        _worker.cache_clear()
        raise
    if answer is None:
        _worker.cache_clear()
        raise TemplateError(f"it was stopped after {SECONDS:g} s, or ended its process")
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


class _Worker:
    """The process, started at first use; it ends when this one does, since its input ends then."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{WORKER} does not start with {sys.executable}; is jinja2 installed there?")

    def ask(self, request: Mapping[str, object]) -> dict[str, str] | None:
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


@functools.cache
def _worker() -> _Worker:
    return _Worker()
