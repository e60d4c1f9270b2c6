"""The elementwise work of a gated delta net in C (delta.c), where a machine can compile it and tensors fit.

The one place that decides: `delta_kernels` gives the functions for some tensors, or None, and callers then use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units

SOURCE = Path(__file__).with_name("delta.c")
# NaN and infinity keep their meaning; errno and the flags of floating point, which nobody reads, do not.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
LARGEST_HEAD = 512
ELEMENTS_A_THREAD = 2**14  # fewer are done before another thread has started
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# What functions take before their last two arguments, the kind of numbers and how many threads.
_ARGUMENTS = {
    "delta_scores": [*[_P] * 6, _I, _I, _I],
    "gated_norm": [*[_P] * 4, _I, _I, _F],
    "gated_norm_backward": [*[_P] * 5, _I, _I, _F],
}


def delta_kernels(head_size: int, *tensors: torch.Tensor) -> DeltaKernels | None:
    """The functions in C for heads of this size at most, and these tensors: on a CPU, all in fp32 or all in bf16."""
    dtype = tensors[0].dtype
    fits = dtype in KINDS and all(x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous() for x in tensors)
    return compiled() if fits and head_size <= LARGEST_HEAD else None


@functools.cache
def compiled() -> DeltaKernels | None:
    """The functions in C, compiled at the first call; None where that cannot be."""
    if sys.platform != "linux":
        return None
    found = compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))
    return None if isinstance(found, str) else DeltaKernels(found)


def _declare(library: ctypes.CDLL) -> None:
    """Say what its functions take, and that they return nothing."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*arguments, _I, _I], None


class DeltaKernels:
    """delta.c on tensors for which `delta_kernels` gives it; shapes as in delta/rule.py and delta/block.py.

    Work is shared among PyTorch's threads, and results do not depend on how many.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def scores(
        self,
        products: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        within: torch.Tensor,
        scores: torch.Tensor,
        solved: torch.Tensor,
    ) -> None:
        """Write D, both halves of products times D, and the inverse of the triangular system times beta; all fp32."""
        places = (_at(tensor) for tensor in (products, decay, beta, within, scores, solved))
        self._library.delta_scores(*places, *decay.shape, *_how(scores))

    def gated_norm(
        self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epsilon: float
    ) -> None:
        """out = x / sqrt(mean(x^2) + epsilon) * weight * silu(z) of each head, all [N, H e]."""
        places = (_at(tensor) for tensor in (x, z, weight, out))
        self._library.gated_norm(*places, x.numel() // len(weight), len(weight), epsilon, *_how(x))

    def gated_norm_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        z: torch.Tensor,
        weight: torch.Tensor,
        grad_x: torch.Tensor,
        epsilon: float,
    ) -> None:
        """Put the gradient of z in grad's place, and that of x in grad_x."""
        places = (_at(tensor) for tensor in (grad, x, z, weight, grad_x))
        self._library.gated_norm_backward(*places, x.numel() // len(weight), len(weight), epsilon, *_how(x))


def _at(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers lie; the caller keeps it alive."""
    return tensor.data_ptr()


def _how(x: torch.Tensor) -> tuple[int, int]:
    """The kind of numbers, and how many threads are worth their start."""
    return KINDS[x.dtype], max(1, min(torch.get_num_threads(), x.numel() // ELEMENTS_A_THREAD))
