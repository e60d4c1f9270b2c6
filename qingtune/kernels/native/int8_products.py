"""Products of int8 matrices with their scales, in one call: int8_products.c where the machine can compile it."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags, cpu_multiplies_int8

SOURCE = Path(__file__).with_name("int8_products.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


def int8_products_library() -> ctypes.CDLL | str:
    """The compiled functions, or the reason why there are none; compiled at the first call."""
    flags = cpu_flags()
    if sys.platform != "linux" or not {"avx2", "fma", "f16c"} <= flags:
        return "they are for x86 CPUs with AVX2 on Linux"
    if not cpu_multiplies_int8():
        return "with AVX-512 but without VNNI products in fp32 are as fast"
    if "amx_int8" in flags:
        return "PyTorch multiplies by AMX"
    return compiled_library(SOURCE, declare, flags_of_hidden_units())


def declare(library: ctypes.CDLL) -> None:
    """Say what its functions take and return."""
    of_q, of_weight = [_POINTER, _POINTER, _NUMBER], [_POINTER, *[_NUMBER] * 3, _POINTER]
    library.multiply.argtypes = [*of_q, *of_weight, _POINTER, *[_NUMBER] * 3, _POINTER, _NUMBER]
    library.multiply.restype = None
    library.room_bytes.argtypes = [_NUMBER] * 3
    library.room_bytes.restype = _NUMBER


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = int8_products_library()
    return None if isinstance(found, str) else found


def in_c() -> bool:
    """Whether this CPU has them."""
    return _library() is not None


def fits(packed: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `multiply` takes these."""
    laid_out = packed.is_contiguous() and (weight.is_contiguous() or weight.t().is_contiguous())
    on_cpu = packed.device.type == "cpu" and out.dtype in KINDS and out.stride(1) == 1
    return laid_out and on_cpu and in_c()


def room_bytes(rows: int, deep: int) -> int:
    """Bytes that a product of so many rows of K = deep numbers takes in addition to its inputs and output."""
    library = _library()
    assert library is not None
    return int(library.room_bytes(rows, deep, torch.get_num_threads()))


def multiply(
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None,
    out: torch.Tensor,
    room: torch.Tensor,
    *,
    add: bool,
) -> None:
    """out (+)= scales * (packed @ weight) * columns, for what `fits`; arguments as in int8.int8_product.

    Args:
        room: uint8, of at least `room_bytes`.
    """
    library = _library()
    assert library is not None
    deep, wide = weight.shape
    of_weight = weight.data_ptr(), not weight.is_contiguous(), wide, deep
    of_out = out.data_ptr(), out.stride(0), KINDS[out.dtype], add
    scale, column = scales.data_ptr(), None if columns is None else columns.data_ptr()
    threads = torch.get_num_threads()
    library.multiply(packed.data_ptr(), scale, len(packed), *of_weight, column, *of_out, room.data_ptr(), threads)
