"""NF4 weights unpacked in C (nf4.c), where a machine can compile it."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.kernels.native.elementwise import ELEMENTS_A_THREAD, KINDS

SOURCE = Path(__file__).with_name("nf4.c")
FLAGS = ("-ffp-contract=off",)
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def nf4_library() -> ctypes.CDLL | str:
    """The compiled function, or the reason why there is none; compiled at the first call."""
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    return compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))


def _declare(library: ctypes.CDLL) -> None:
    library.unpack.argtypes = [*[_P] * 5, _I, _F, _P, _I, _I, _I, _I]
    library.unpack.restype = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = nf4_library()
    return None if isinstance(found, str) else found


def fits(state: Any, out: torch.Tensor) -> bool:
    """Whether `unpack` can write there: fp32 or bf16 on a CPU, contiguous; scales are quantised or fp32."""
    place = out.device.type == "cpu" and out.dtype in KINDS and out.is_contiguous()
    return place and (state.nested or state.absmax.dtype == torch.float32) and _library() is not None


def unpack(packed: torch.Tensor, state: Any, offset: float, out: torch.Tensor) -> None:
    """Write the weight that packed holds, bit for bit as bitsandbytes unpacks it to the state's dtype.

    Args:
        packed: uint8, two numbers each.
        state: bitsandbytes' QuantState of nf4.
        offset: the state's, where its scales are quantised as well; else 0.
        out: [out, in], as it `fits`.
    """
    library = _library()
    assert library is not None
    if state.nested:
        inner = state.state2
        scales = state.absmax.data_ptr(), inner.code.data_ptr(), inner.absmax.data_ptr(), inner.blocksize, offset
    else:
        scales = None, None, state.absmax.data_ptr(), 1, offset
    threads = max(1, min(torch.get_num_threads(), out.numel() // ELEMENTS_A_THREAD))
    sizes = out.numel(), state.blocksize, KINDS[out.dtype], threads
    library.unpack(packed.data_ptr(), state.code.data_ptr(), *scales, out.data_ptr(), *sizes)
