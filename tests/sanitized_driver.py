"""A driver of kernels in C, compiled with the sanitizers of addresses and undefined behaviour, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qingtune.machine.resources import cpu_flags

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
TESTS = Path(__file__).parent


def check_driver(driver: str, source: Path, flags_of_source: Sequence[str], folder: Path, *, avx512: bool) -> None:
    """Compile a driver of the tests with a source of the kernels and run it: it must end well, by three threads.

    Skips, with the reason, where the CPU lacks AVX-512 that is asked for, or the compiler has no sanitizers.
    """
    if avx512 and "avx512f" not in cpu_flags():
        pytest.skip("a CPU without AVX-512")
    assert COMPILER
    program, trivial = folder / "driver", folder / "trivial.c"
    trivial.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    flags = [f'-DSOURCE="{source}"', "-std=c11", "-g1", "-O1", "-fopenmp", *flags_of_source, "-march=native"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *["-mno-avx512f"] * (not avx512)]
    for file in (trivial, TESTS / driver):
        command = [COMPILER, *flags, str(file), "-o", str(program), "-lm"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if file == trivial and (made.returncode or subprocess.run([program], check=False).returncode):
            pytest.skip(f"no such compiler or sanitizer: {made.stderr[-200:]}")
        assert made.returncode == 0, made.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
