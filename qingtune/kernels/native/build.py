"""Compile kernels in C for this machine, once, and load them: those of training and of answering."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qingtune.errors import UserError
from qingtune.files.paths import default_cache
from qingtune.machine.resources import cpu_flags, hidden_cpu_flags
from qingtune.output.console import say

FLAGS = ("-O3", "-march=native", "-std=c11", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
HEADERS = Path(__file__).parent  # what kernels of other rooms include as well
SECONDS = 120  # that a compiler may take
# What kernels ask the compiler for, by Linux's name and by the compiler's.
UNITS = {"avx512f": "avx512f", "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx_vnni": "avxvnni"}
# What PyTorch does where a file is not compiled; of others their name says it.
WORK = {
    "elementwise": "elementwise work", "nf4": "unpacking weights of 4 bits", "products": "products in fp32",
    "low_rank": "adapters' products", "few_rows": "products of few rows in bf16",
    "int8_products": "products in 8 bits", "delta": "gated delta nets",
    "delta_rule": "gated delta nets", "delta_step": "gated delta nets' new tokens", "answer_step": "new tokens",
}  # fmt: skip


@functools.cache
def compiled_library(
    source: Path, declare: Callable[[ctypes.CDLL], None], flags: tuple[str, ...] = ()
) -> ctypes.CDLL | str:
    """The library that a file of C makes on this machine, compiled at the first call; or the reason why there is none,
    which is reported once.

    What was compiled is kept in the user's own cache folder, and loaded only if nobody else can write there or wrote
    the file: a cache shared with others must not be a way to run their code. Processes that compile at the same time
    each make a file and move it into its place.

    Args:
        declare: called once with the library, to say what its functions take and return.
        flags: for the compiler, after FLAGS.
    """
    compiler = _compiler_or_reason()
    if isinstance(compiler, str):  # the same for all files
        _report("instead of kernels in C", compiler)
        return compiler
    try:
        library = _loaded(compiler, source, (*FLAGS, *flags))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        reason = f"{shlex.join(compiler)} failed: {lines[-1]}"
    except (OSError, UserError, subprocess.TimeoutExpired) as error:
        reason = f"the compiled kernels cannot be used: {error}"
    else:
        declare(library)
        return library
    _report(f"for {WORK.get(source.stem, source.stem)}", reason)
    return reason


@functools.cache
def _report(where: str, reason: str) -> None:
    """Once in a process, though delta nets have several files, and options for the compiler vary."""
    say(f"Using PyTorch {where} (slower): {reason}.")


def flags_of_hidden_units() -> tuple[str, ...]:
    """Options for the compiler, so that a CPU which QINGTUNE_CPU_WITHOUT makes a lesser one is compiled for as such."""
    hidden = hidden_cpu_flags()
    return tuple(f"-mno-{option}" for name, option in UNITS.items() if name in hidden)


def _compiler_or_reason() -> list[str] | str:
    """The user's own choice in CC, or the first one found; or why nothing is compiled."""
    if os.environ.get("QINGTUNE_NATIVE") == "0":
        return "QINGTUNE_NATIVE is 0"
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        return f"CC is not a valid command: {error}"
    for words in (chosen, *([name] for name in COMPILERS)):
        if words and shutil.which(words[0]):
            return words
    return "there is no C compiler (cc, gcc or clang)"


def _loaded(compiler: list[str], source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library, made if it is not there for this source, compiler and machine, or cannot be loaded.

    Headers in the source's folder and in this one count as part of it.
    """
    version = _run([*compiler, "--version"])
    headers = sorted({*source.parent.glob("*.h"), *HEADERS.glob("*.h")})
    texts = [path.read_text(encoding="utf-8") for path in (source, *headers)]
    parts = [*texts, version, *flags, *sorted(cpu_flags())]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = default_cache() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_of_others(folder, folder.stat())
    path = folder / f"{source.stem}-{name}.so"
    with suppress(OSError):  # missing, truncated, or somebody else's: compile it again
        return _load(path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        _run([*compiler, *flags, f"-I{HEADERS}", str(source), "-o", str(made), "-lm"])
        made.chmod(0o700)  # a umask may have left it open to the group
        library = _load(made)
        os.replace(made, path)
        return library


def _load(path: Path) -> ctypes.CDLL:
    """Load a library that nobody else can have written; what was looked at is loaded, whatever happens to the path."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _refuse_of_others(path, os.fstat(handle))
        return ctypes.CDLL(f"/proc/self/fd/{handle}")  # stays open: to the loader, the same name is the same library
    except OSError:
        os.close(handle)
        raise


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS).stdout


def _refuse_of_others(path: Path, status: os.stat_result) -> None:
    """Only this user, or root, may own it and write to it."""
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {path}")
