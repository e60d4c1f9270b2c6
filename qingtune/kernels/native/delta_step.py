"""A new token of a gated delta net in C (delta_step.c), where a machine can compile it and tensors fit."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units

SOURCE = Path(__file__).with_name("delta_step.c")
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
LARGEST_HEAD = 512
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class _Inputs(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor) -> _Inputs:
        return cls(x.data_ptr(), x.stride(0))


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _Inputs) for name in ("qkv", "z", "b", "a")),
        *((name, ctypes.c_void_p) for name in ("rows", "states", "taps", "rate", "bias", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "channels", "key_heads", "share", "key_size")),
        *((name, ctypes.c_int64) for name in ("value_size", "seen")),
        *((name, ctypes.c_float) for name in ("length_epsilon", "norm_epsilon")),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The function in C, compiled at the first call; None where that cannot be."""
    if sys.platform != "linux":
        return None
    found = compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))
    return None if isinstance(found, str) else found


def _declare(library: ctypes.CDLL) -> None:
    library.delta_step.argtypes = [ctypes.POINTER(_Step), ctypes.c_int64, ctypes.c_int64]
    library.delta_step.restype = None


def fits(sizes: DeltaNet, inputs: tuple[torch.Tensor, ...], states: tuple[torch.Tensor, ...]) -> bool:
    """Whether `step` takes these: on a CPU, inputs in one dtype, bf16 or fp32, and states in fp32."""
    dtype = inputs[0].dtype
    return (
        dtype in KINDS
        and max(sizes.key_size, sizes.value_size) <= LARGEST_HEAD
        and all(x.device.type == "cpu" and x.dtype == dtype and x.stride(-1) == 1 for x in inputs)
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in states)
        and _library() is not None
    )


def step(
    sizes: DeltaNet,
    inputs: tuple[torch.Tensor, ...],
    states: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    length_epsilon: float,
    norm_epsilon: float,
) -> torch.Tensor:
    """What the output layer reads after one new token of each of B sequences, for what `fits`: [B, H e], as the inputs.

    Args:
        inputs: queries, keys and values before the convolution [B, M], z [B, H e], b and a [B, H].
        states: the convolution's rows [B, w - 1, M] and the recurrence's states [B, H, d, e], changed in place.
        weights: taps [w, M], rate [H], bias [H] and the norm's [e], fp32 without gaps.
        length_epsilon: added to the squared lengths of queries and keys.
        norm_epsilon: of the norm.
    """
    library = _library()
    assert library is not None
    qkv, z = inputs[:2]
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    held = _Step(
        *map(_Inputs.of, inputs),
        *(x.data_ptr() for x in (*states, *weights, out)),
        len(qkv), qkv.shape[1], sizes.key_heads, sizes.value_heads // sizes.key_heads, sizes.key_size,
        sizes.value_size, sizes.kernel, length_epsilon, norm_epsilon,
    )  # fmt: skip
    library.delta_step(held, KINDS[qkv.dtype], torch.get_num_threads())
    return out
