"""The products of low-rank adapters in C (low_rank.c), where the machine can compile it and the numbers fit."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("low_rank.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1}
OPERATIONS_A_THREAD = 2**18  # fewer are done before another thread has started

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS, _PARTS, _HOW = [_P, _I, _I], [_P, _P, _I], [_I, _I]
_ARGUMENTS = {
    "reduce": [*_ROWS, *_PARTS, _I, _I, _F, _P, _P, _I, *_HOW],
    "expand": [*_ROWS, *_PARTS, _I, _I, _F, _P, _I, *_HOW],
    "outer": [*_ROWS, *_ROWS, _I, _F, *_PARTS, *_HOW],
}


def low_rank_library() -> ctypes.CDLL | str:
    """The compiled functions, or the reason why there are none; compiled at the first call."""
    if sys.platform != "linux" or not {"avx2", "fma", "f16c"} <= cpu_flags():
        return "they are for x86 CPUs with AVX2 on Linux"
    return compiled_library(SOURCE, _declare, flags_of_hidden_units())


def _declare(library: ctypes.CDLL) -> None:
    """Say what its functions take and return."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.takes_bf16.argtypes, library.takes_bf16.restype = [], _I


@functools.cache
def low_rank() -> LowRankProducts | None:
    """The functions in C, compiled at the first call; None where that cannot be."""
    found = low_rank_library()
    return None if isinstance(found, str) else LowRankProducts(found)


def native_low_rank(dtype: torch.dtype, device: torch.device) -> LowRankProducts | None:
    """The functions in C where activations of this dtype there are multiplied by fp32 adapters with them, else None."""
    if dtype not in KINDS or device.type not in ("cpu", "meta") or (c := low_rank()) is None:
        return None
    return c if dtype == torch.float32 or c.takes_bf16 else None


class LowRankProducts:
    """low_rank.c on tensors.

    Activations are in one dtype of `native_low_rank`, and their rows may have gaps between them, but not in them;
    adapters' matrices and gradients are fp32 and contiguous. In bf16 all sizes but the number of rows of activations
    are even, and so are their strides. Work is shared among PyTorch's threads; results do not depend on how many.

    Attributes:
        takes_bf16: whether the CPU has dot products of bf16, and no units for whole tiles (AMX), which PyTorch's faster
            products use.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.takes_bf16 = bool(library.takes_bf16()) and "amx_bf16" not in cpu_flags()

    def reduce(
        self,
        x: torch.Tensor,
        matrices: Sequence[torch.Tensor],
        out: torch.Tensor,
        room: torch.Tensor,
        *,
        transposed: bool,
        scale: float = 1.0,
    ) -> None:
        """out = scale * x @ M; M: all matrices, one below the other, or the transpose of that.

        Args:
            x: [T, K].
            matrices: fp32 [.., N] with K rows in all, or `transposed` [.., K] with N rows in all.
            out: [T, N], N being small.
            room: fp32, of footprint.low_rank_room(K, N, bytes of a number of x) numbers, overwritten.
        """
        how = transposed, scale, room.data_ptr()
        threads = _threads(len(x) * x.shape[1] * out.shape[1])
        self._library.reduce(
            *_rows(x), len(x), *_parts(matrices), matrices[0].shape[1], *how, *_rows(out), *_how(x, threads)
        )

    def expand(
        self,
        x: torch.Tensor,
        matrices: Sequence[torch.Tensor],
        out: torch.Tensor,
        *,
        transposed: bool,
        scale: float = 1.0,
    ) -> None:
        """out += scale * x @ M; x: [T, K], K being small; out: [T, N]; otherwise as in `reduce`."""
        threads = _threads(len(x) * x.shape[1] * out.shape[1])
        how = transposed, scale
        self._library.expand(
            *_rows(x), len(x), *_parts(matrices), matrices[0].shape[1], *how, *_rows(out), *_how(x, threads)
        )

    def outer(
        self, left: torch.Tensor, right: torch.Tensor, totals: Sequence[torch.Tensor], scale: float = 1.0
    ) -> None:
        """Totals, one below the other fp32 [M, N], += scale * left^T @ right; left: [T, M], right: [T, N]."""
        threads = _threads(left.numel() * right.shape[1])
        sizes = *_rows(left), left.shape[1], *_rows(right), right.shape[1], len(left)
        self._library.outer(*sizes, scale, *_parts(totals), *_how(left, threads))


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """Where its numbers lie, and how many there are from one row to the next."""
    assert x.stride(1) == 1
    return x.data_ptr(), x.stride(0)


def _parts(matrices: Sequence[torch.Tensor]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64], int]:
    """Where matrices lie, and how many rows each has."""
    count = len(matrices)
    return (_P * count)(*(m.data_ptr() for m in matrices)), (_I * count)(*(len(m) for m in matrices)), count


def _threads(operations: int) -> int:
    """How many threads are worth their start."""
    return max(1, min(torch.get_num_threads(), operations // OPERATIONS_A_THREAD))


def _how(x: torch.Tensor, threads: int) -> tuple[int, int]:
    return KINDS[x.dtype], threads
