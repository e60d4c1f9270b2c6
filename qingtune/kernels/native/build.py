"""Compile the kernels in C for this machine, once, and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from qingtune.files import default_cache
from qingtune.machine import cpu_flags

SOURCE = Path(__file__).with_name("answer_step.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120  # that a compiler may take


@functools.cache
def native_library() -> ctypes.CDLL | str:
    """The compiled kernels, or the reason why this machine, whose CPU could run them, has none.

    What was compiled is kept in the user's own cache folder, and loaded only if nobody else can write there: a cache
    shared with others must not be a way to run their code.
    """
    if os.environ.get("QINGTUNE_NATIVE") == "0":
        return "QINGTUNE_NATIVE is 0"
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang)"
    try:
        library = _loaded(compiler)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(compiler)} failed: {_last_line(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiled kernels cannot be used: {error}"
    library.scratch_bytes.restype = library.product_scratch_bytes.restype = ctypes.c_int64
    return library


def has_native_units() -> bool:
    """Whether the kernels are for this machine: Linux on x86 with AVX-512 and its int8 products."""
    return sys.platform == "linux" and {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= cpu_flags()


def _compiler() -> list[str] | None:
    """The user's own choice in CC, or the first one found."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for words in (chosen, *([name] for name in COMPILERS)):
        if words and shutil.which(words[0]):
            return words
    return None


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library, made if it is not there for this source, compiler and machine, or cannot be loaded."""
    version = _run([*compiler, "--version"])
    parts = [SOURCE.read_text(encoding="utf-8"), version, *FLAGS, *sorted(cpu_flags())]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = _own_folder()
    path = folder / f"answer_step-{name}.so"
    if path.exists():
        with suppress(OSError):  # cut off, perhaps: made anew
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"])
        library = ctypes.CDLL(str(made))
        os.replace(made, path)
        return library


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


def _own_folder() -> Path:
    """A folder that only this user can write to.

    Raises:
        OSError: there is none.
    """
    folder = default_cache() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {folder}")
    return folder


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
