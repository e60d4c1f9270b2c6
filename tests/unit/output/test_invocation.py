"""Commands in messages: called as this process was, and quoted for the shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qingtune.output.invocation import command_line, program, shown


@pytest.mark.parametrize(
    ("argv0", "train", "chat", "merge"),
    [
        ("qingtune", "qingtune train", "qingtune chat", "qingtune merge"),
        ("/opt/bin/qingtune", "qingtune train", "qingtune chat", "qingtune merge"),
        ("other/bin/qingtune", *(f"other/bin/qingtune {name}" for name in ("train", "chat", "merge"))),
        ("/src/qingtune/__main__.py", *(f"python3 -m qingtune {name}" for name in ("train", "chat", "merge"))),
        ("tools/demo.py", *(f"python3 -m qingtune {name}" for name in ("train", "chat", "merge"))),
        (
            "fine_tune_qwen.py",
            "python3 fine_tune_qwen.py",
            "python3 inference_lora.py --chat",
            "python3 -m qingtune merge",
        ),
        (
            "../q/inference_lora.py",
            "python3 ../q/fine_tune_qwen.py",
            "python3 ../q/inference_lora.py --chat",
            "python3 -m qingtune merge",
        ),
    ],
)
def test_commands_are_called_as_the_process_was(
    argv0: str, train: str, chat: str, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [argv0, "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", argv0])
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/bin/{name}")
    assert [shown(program(name)) for name in ("train", "chat", "merge")] == [train, chat, merge]


@pytest.mark.parametrize("name", ["a b", "it's", '"q"', "面包房", "$HOME; rm", "-x", "a\tb", "plain"])
def test_a_shell_reads_back_what_is_shown(name: str, tmp_path: Path) -> None:
    line = command_line("chat", base_model=name, lora_model=tmp_path / name, prompt=None)
    wanted = [f"--base_model={name}"] if name.startswith("-") else ["--base_model", name]
    assert shlex.split(line) == ["qingtune", "chat", *wanted, "--lora_model", str(tmp_path / name)]


def test_windows_quotes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["qingtune", "chat", "--base_model", r"C:\my models\q"]
    monkeypatch.setattr(os, "name", "nt")
    line = shown(words)
    monkeypatch.undo()
    assert line == subprocess.list2cmdline(words) == r'qingtune chat --base_model "C:\my models\q"'
