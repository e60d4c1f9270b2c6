"""How the program was called, so that every command that a message names works where it is typed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPTS = {"train": "fine_tune_qwen.py", "infer": "inference_lora.py", "chat": "inference_lora.py"}


def program(command: str) -> list[str]:
    """The words that call a command of qingtune in the way in which this process was called.

    That is `qingtune chat` from the console script, `python inference_lora.py --chat` from the guide's scripts, and
    `python -m qingtune chat` from everything else, such as the module, a notebook or a script of the user's.
    """
    called = Path(sys.argv[0] if sys.argv else "")
    if called.stem == "qingtune":
        found = called.parent == Path() or str(called) == shutil.which(called.stem)
        return [called.stem if found else str(called), command]
    python = (sys.orig_argv or [sys.executable])[0]
    if called.name in _SCRIPTS.values() and command in _SCRIPTS:
        return [python, str(called.with_name(_SCRIPTS[command])), *(["--chat"] if command == "chat" else [])]
    return [python, "-m", "qingtune", command]


def shown(words: Sequence[str]) -> str:
    """Words as they are typed in the system's shell, quoted where they need it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command_line(command: str, *flags: str, **settings: str | Path | None) -> str:
    """A command to be typed, with settings by name (None leaves one out) and then flags as they are."""
    words = program(command)
    for name, value in settings.items():
        if value is not None:
            text = str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shown([*words, *flags])
