"""bf16 products of a few rows with weights as they lie in memory: few_rows.c where the machine can compile it."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("few_rows.c")
MOST = 96  # rows: with more, laying the weight out takes oneDNN no longer than it gains
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


def few_rows_library() -> ctypes.CDLL | str:
    """The compiled functions, or the reason why there are none; compiled at the first call."""
    flags = cpu_flags()
    if sys.platform != "linux" or not {"avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= flags:
        return "they are for x86 CPUs with AVX512-BF16 on Linux"
    if "amx_bf16" in flags:
        return "PyTorch multiplies by AMX"
    return compiled_library(SOURCE, _declare, flags_of_hidden_units())


def _declare(library: ctypes.CDLL) -> None:
    of_x, of_weight, of_y = [_POINTER, _NUMBER, _NUMBER], [_POINTER, *[_NUMBER] * 3], [_POINTER, *[_NUMBER] * 3]
    library.few_rows.argtypes = [*of_x, *of_weight, *of_y]
    library.few_rows.restype = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = few_rows_library()
    return None if isinstance(found, str) else found


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether activations of this dtype there are multiplied so, sizes aside."""
    return dtype == torch.bfloat16 and device.type in ("cpu", "meta") and _library() is not None


def fits(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `multiply` takes these, and is worth it."""
    if not (0 < x.shape[0] <= MOST and x.dtype == weight.dtype == out.dtype and takes(x.dtype, x.device)):
        return False
    deep, wide = weight.shape
    by_columns = weight.is_contiguous()
    if by_columns:
        laid_out = wide % 64 == 0 and deep % 2 == 0
    else:
        laid_out = weight.t().is_contiguous() and wide % 4 == 0 and deep % 32 == 0
    return laid_out and x.stride(1) == out.stride(1) == 1


def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """out (+)= x @ weight, for what `fits`, summed in fp32.

    Args:
        x: bf16 [T, K], its rows without gaps in them.
        weight: bf16 [K, N], contiguous or the transpose of a contiguous one.
        out: bf16 [T, N], like x.
        add: to what out holds, instead of replacing it.
    """
    library = _library()
    assert library is not None
    deep, wide = weight.shape
    of_weight = weight.data_ptr(), not weight.is_contiguous(), wide, deep
    of_out = out.data_ptr(), out.stride(0), add, torch.get_num_threads()
    library.few_rows(x.data_ptr(), x.stride(0), x.shape[0], *of_weight, *of_out)
