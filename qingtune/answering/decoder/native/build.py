"""The answering step in C: whether this machine can run it, and its library."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("answer_step.c")


def native_library(*flags: str) -> ctypes.CDLL | str:
    """The compiled kernels, or the reason why there are none on a CPU that could run them.

    Args:
        flags: more of them for the compiler.
    """
    return compiled_library(SOURCE, _declare, (*flags_of_hidden_units(), *flags))


def _declare(library: ctypes.CDLL) -> None:
    """Say what its functions return, where that is no int."""
    for function in (library.scratch_bytes, library.product_scratch_bytes, library.mixture_scratch_bytes):
        function.restype = ctypes.c_int64


def has_native_units() -> bool:
    """Whether the kernels are for this machine: Linux on x86 with AVX2, FMA and F16C."""
    return sys.platform == "linux" and {"avx2", "fma", "f16c"} <= cpu_flags()
