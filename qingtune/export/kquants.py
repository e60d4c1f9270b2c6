"""K-quants, made of a GGUF file in 16 bits by llama.cpp's own quantiser, which llama-cpp-python brings."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from qingtune.errors import UserError, shorten
from qingtune.output.console import say

SCRIPT = Path(__file__).with_name("kquant_process.py")
REQUIREMENT = "llama-cpp-python==0.3.36"  # the extra `kquants` of pyproject.toml
_SAY_EVERY_S = 10.0
_FULL = 1 << 24  # bytes free on a disk at whose end llama.cpp, which does not say why it cannot write, gave up


def require_quantizer() -> None:
    """Raise a UserError unless llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            "K-quants are made by llama.cpp's quantiser, which is not installed",
            where="quantize",
            fix=f"Run `pip install {REQUIREMENT}` (compiles for some minutes, with a C++ compiler), or choose q8_0 or "
            "q4_0, which need nothing else.",
        )


def quantize_gguf(source: Path, target: Path, form: str, threads: int) -> None:
    """Write a GGUF file in another form.

    Args:
        source: in 16 or 32 bits.
        target: does not exist yet; if this fails, what is there of it is of no use.
        form: one of K_QUANTS.

    Raises:
        UserError: llama.cpp failed.
        OSError: the disk is full.
    """
    command = [sys.executable, str(SCRIPT), str(source), str(target), form.upper(), str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            _report(process)
            assert process.stderr is not None
            complaint = process.stderr.read().strip()
        except BaseException:  # Ctrl-C, too, which code in C does not heed
            process.kill()
            raise
    if process.returncode == 0:
        return
    if shutil.disk_usage(target.parent).free < _FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    reason = complaint.splitlines()[-1] if complaint else f"its process ended with {process.returncode}"
    fix = "Pass --quantize q8_0 or q4_0, which qingtune writes itself."
    raise UserError(f"llama.cpp could not make {target.name}: {shorten(reason, 300)}", fix=fix)


def _report(process: subprocess.Popen[str]) -> None:
    """Report how far the process is, now and then, until it ends its output."""
    assert process.stdout is not None
    said = time.monotonic()
    for line in process.stdout:
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            done, total = line.split()
            say(f"Quantising: {done} of {total} tensors")
