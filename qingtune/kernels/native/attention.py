"""Causal attention over the segments of a layout in C (attention.c), where a machine can compile it and tensors fit.

The one place that decides: `attention_kernels` gives the functions, or None, and callers then use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from qingtune.kernels.architecture import Attention
from qingtune.kernels.layout import Blocks
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.kernels.native.elementwise import FLAGS, KINDS
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("attention.c")
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Given(ctypes.Structure):
    """What a call computes, as attention_tiles.h has it; the last two are for the functions themselves."""

    _fields_ = (
        *((name, _P) for name in ("q", "k", "v", "segments", "begins", "ends")),
        *((name, _I) for name in ("count", "rows", "heads", "key_heads", "size")),
        ("scale", ctypes.c_float),
        *((name, _I) for name in ("kind", "filled", "words")),
    )


def attention_kernels(heads: Attention, dtype: torch.dtype, device: torch.device) -> AttentionKernels | None:
    """The functions in C for a layer whose scores are not capped and numbers of this dtype there: on a CPU, fp32, or
    bf16 where the CPU multiplies it."""
    if heads.cap is not None or device.type != "cpu" or dtype not in KINDS:
        return None
    found = compiled()
    return found if found and (dtype == torch.float32 or found.narrow) else None


def in_c(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention without caps is that in C for this dtype there; on the meta device, whether it would be."""
    where = torch.device("cpu") if device.type == "meta" else device
    return attention_kernels(Attention(1, 1, 1, 1.0), dtype, where) is not None


@functools.cache
def compiled() -> AttentionKernels | None:
    """The functions in C, compiled at the first call; None where that cannot be."""
    if sys.platform != "linux" or not {"avx2", "fma", "f16c"} <= cpu_flags():
        return None
    found = compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))
    return None if isinstance(found, str) else AttentionKernels(found)


def _declare(library: ctypes.CDLL) -> None:
    given = ctypes.POINTER(_Given)
    library.attention_narrow.argtypes, library.attention_narrow.restype = [], _I
    library.attention_room.argtypes, library.attention_room.restype = [given, _I], _I
    library.attention_forward.argtypes, library.attention_forward.restype = [given, *[_P] * 3, _I], None
    library.attention_backward.argtypes, library.attention_backward.restype = [given, *[_P] * 8, _I], None


@dataclass(frozen=True)
class Given:
    """What both directions take; all contiguous, in one dtype.

    Attributes:
        heads: sizes of the layer.
        blocks: which keys rows see.
        q: [N, query heads, d].
        k: [T, key-value heads, d]; likewise v.
    """

    heads: Attention
    blocks: Blocks
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class AttentionKernels:
    """attention.c on tensors for which `attention_kernels` gives it.

    Work is shared among PyTorch's threads, and results do not depend on how many.

    Attributes:
        narrow: whether it multiplies bf16.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.narrow = bool(library.attention_narrow())

    def forward(self, given: Given, out: torch.Tensor, lengths: torch.Tensor) -> None:
        """Write what was attended, [N, query heads * d], and for backward the logarithms to base 2 of the sums of the
        exponentials of scores, fp32 [query heads, N]."""
        threads, room = self._room(given)
        self._library.attention_forward(_structure(given), *_at(out, lengths, room), threads)

    def backward(
        self,
        given: Given,
        out: torch.Tensor,
        lengths: torch.Tensor,
        grad: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sums: torch.Tensor,
    ) -> None:
        """Write the gradients of q, k and v.

        Args:
            out: what forward gave, and lengths.
            grad: of out, in its dtype.
            sums: for what threads add up, fp32, of `gradient_sums` (block_sizes.py).
        """
        threads, room = self._room(given)
        self._library.attention_backward(_structure(given), *_at(out, lengths, grad, *grads, sums, room), threads)

    def _room(self, given: Given) -> tuple[int, torch.Tensor]:
        threads = torch.get_num_threads()
        return threads, torch.empty(self._library.attention_room(_structure(given), threads))


def _structure(given: Given) -> _Given:
    heads, lying = given.heads, given.blocks.lying
    places = (*_at(given.q, given.k, given.v, lying.segments), *_at(*lying.spans))
    sizes = len(lying.segments), len(given.q), heads.queries, heads.keys, heads.size
    return _Given(*places, *sizes, heads.scale, KINDS[given.q.dtype], 0, 0)


def _at(*tensors: torch.Tensor) -> list[int]:
    """Where tensors' numbers lie; the caller keeps them alive."""
    return [tensor.data_ptr() for tensor in tensors]
