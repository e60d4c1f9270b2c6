"""The answering step in C: whether this machine can run it, and its library."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from qingtune.kernels.native.build import compiled_library
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("answer_step.c")


def native_library() -> ctypes.CDLL | str:
    """The compiled kernels, or the reason why there are none on a CPU that could run them."""
    return compiled_library(SOURCE, _declare)


def _declare(library: ctypes.CDLL) -> None:
    """Say what its functions return, where that is no int."""
    library.scratch_bytes.restype = library.product_scratch_bytes.restype = ctypes.c_int64


def has_native_units() -> bool:
    """Whether the kernels are for this machine: Linux on x86 with AVX-512 and its int8 products."""
    return sys.platform == "linux" and {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= cpu_flags()
