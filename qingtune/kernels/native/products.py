"""fp32 products with weights as they are stored: products.c where the machine can compile it."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("products.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


def products_library() -> ctypes.CDLL | str:
    """The compiled functions, or the reason why there are none; compiled at the first call."""
    if sys.platform != "linux" or not {"avx2", "fma", "f16c"} <= cpu_flags():
        return "they are for x86 CPUs with AVX2 on Linux"
    return compiled_library(SOURCE, _declare, flags_of_hidden_units())


def _declare(library: ctypes.CDLL) -> None:
    of_x, of_weight, of_y = [_POINTER, _NUMBER, _NUMBER], [_POINTER, *[_NUMBER] * 4], [_POINTER, *[_NUMBER] * 3]
    library.multiply.argtypes = [*of_x, *of_weight, *of_y]
    library.multiply.restype = None


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = products_library()
    return None if isinstance(found, str) else found


def reads_as_stored(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether activations of this dtype there are multiplied by weights of other dtypes without a copy of them."""
    return dtype == torch.float32 and device.type in ("cpu", "meta") and _library() is not None


def fits(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `multiply` takes these."""
    laid_out = weight.is_contiguous() or weight.t().is_contiguous()
    rows = x.dtype == out.dtype == torch.float32 and x.stride(1) == out.stride(1) == 1
    return rows and laid_out and x.device.type == "cpu" and weight.dtype in KINDS and _library() is not None


def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """out (+)= x @ weight, for what `fits`; a weight in 16 bits gives bit for bit what it gives in fp32.

    Args:
        x: fp32 [T, K], its rows without gaps in them.
        weight: fp32, bf16 or fp16 [K, N], contiguous or the transpose of a contiguous one.
        out: fp32 [T, N], like x.
        add: to what out holds, instead of replacing it.
    """
    library = _library()
    assert library is not None
    deep, wide = weight.shape
    of_weight = weight.data_ptr(), KINDS[weight.dtype], not weight.is_contiguous(), wide, deep
    of_out = out.data_ptr(), out.stride(0), add, torch.get_num_threads()
    library.multiply(x.data_ptr(), x.stride(0), len(x), *of_weight, *of_out)
