"""The elementwise work of training in C (elementwise.c), where a machine can compile it and tensors fit.

The one place that decides: `native` gives the functions for some tensors, or None, and callers then use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qingtune.kernels.architecture import Activation
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units

SOURCE = Path(__file__).with_name("elementwise.c")
# NaN and infinity keep their meaning; errno and the flags of floating point, which nobody reads, do not.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
ELEMENTS_A_THREAD = 2**14  # fewer are done before another thread has started
KINDS = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# What functions take before their last two arguments, the kind of numbers and how many threads.
_ARGUMENTS = {
    "norm": [_P, _P, _P, *[_I] * 5, _F, _F],
    "norm_backward": [*[_P] * 6, *[_I] * 5, _F, _F],
    "norm_add_backward": [_P, _P, _P, _P, _I, _I, _F, _F],
    "gated": [_P, _P, _P, _I, _I],
    "gated_backward": [_P, _P, _P, _P, _I, _I],
    "rotate": [_P, _P, _P, _P, *[_I] * 6],
    "cross_entropy": [_P, _P, _P, _I, _I, _F],
    "running_softmax": [*[_P] * 6, _I, _I, _I],
    "accumulate_rows": [_P, _P, _P, _I, _I],
    "softmax": [*[_P] * 5, _I, _I, _I],
    "quantize_rows": [_P, _P, _P, _P, _I, _I],
    "scale_sums": [_P, _P, _P, _P, _I, _I, _I],
    "widen": [_P, _P, _P, _I, _I],
    "accumulate": [_P, _P, _I, _F],
    "adamw8bit": [*[_P] * 9, _I, *[_F] * 7],
}


def native(*tensors: torch.Tensor, heads: torch.Tensor | None = None) -> Elementwise | None:
    """The functions in C where they are for these tensors: on a CPU, contiguous, all in fp32 or all in bf16.

    heads: one more, which may be a part of other tensors: [T, heads, d] with gaps between its heads and tokens.
    """
    all_of_them = tensors if heads is None else (*tensors, heads)
    dtype = all_of_them[0].dtype
    fits = dtype in KINDS and all(x.device.type == "cpu" and x.dtype == dtype for x in all_of_them)
    fits = fits and all(x.is_contiguous() for x in tensors)
    if heads is not None:
        fits = fits and (heads.is_contiguous() or (heads.ndim == 3 and heads.stride(2) == 1))
    return elementwise() if fits else None


@functools.cache
def elementwise() -> Elementwise | None:
    """The functions in C, compiled at the first call; None where that cannot be."""
    found = elementwise_library()
    return None if isinstance(found, str) else Elementwise(found)


def elementwise_library() -> ctypes.CDLL | str:
    """The compiled functions, or the reason why there are none."""
    if sys.platform != "linux":
        return "they are compiled on Linux only"
    return compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))


def _declare(library: ctypes.CDLL) -> None:
    """Say what its functions take, and that they return nothing."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*arguments, _I, _I], None


class Elementwise:
    """elementwise.c on tensors for which `native` gives it; each function says what it writes to.

    Weights of norms may be of any dtype. Work is shared among PyTorch's threads, and results do not depend on how many.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor, *, offset: float = 0.0
    ) -> None:
        """out = x / sqrt(mean(x^2) + epsilon) * (offset + weight) over the last dimension; out may be x.

        x may have gaps as `native` says of heads, likewise in norm_backward and rotate.
        """
        wide = weight.detach().float()
        self._library.norm(_at(x), _at(wide), _at(out), *_rows(x), *_gaps(x), epsilon, offset, *_how(x))

    def norm_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        out: torch.Tensor,
        *,
        offset: float = 0.0,
        trained: bool = False,
    ) -> torch.Tensor | None:
        """Put the gradient of x in out, fp32; returns the weight's, fp32, where it is trained."""
        wide, rates = weight.detach().float(), torch.empty(x.numel() // x.shape[-1])
        grad_weight = torch.empty_like(wide) if trained else None
        places = (_at(tensor) for tensor in (grad, x, wide, out, rates, grad_weight))
        self._library.norm_backward(*places, *_rows(x), *_gaps(x), epsilon, offset, *_how(x))
        return grad_weight

    def norm_add_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        total: torch.Tensor,
        *,
        offset: float = 0.0,
    ) -> None:
        """Add the gradient of x to total."""
        wide = weight.detach().float()
        places = (_at(tensor) for tensor in (grad, x, wide, total))
        self._library.norm_add_backward(*places, *_rows(x), epsilon, offset, *_how(x))

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, activation: Activation = "silu"
    ) -> None:
        """out = activation(gate) * up; out may be either."""
        self._library.gated(_at(gate), _at(up), _at(out), gate.numel(), ACTIVATIONS[activation], *_how(gate))

    def gated_backward(
        self,
        grad: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        grad_up: torch.Tensor,
        *,
        activation: Activation = "silu",
    ) -> None:
        """Put the gradient of gate in gate's place and that of up in grad_up, which may be up or grad."""
        places = (_at(tensor) for tensor in (grad, gate, up, grad_up))
        self._library.gated_backward(*places, gate.numel(), ACTIVATIONS[activation], *_how(gate))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
        """Turn the first 2 n coordinates of heads, x [T, heads, d], by angles, cos and sin [T, 1, n]; out may be x."""
        places = (_at(tensor) for tensor in (x, cos, sin, out))
        self._library.rotate(*places, *x.shape, cos.shape[-1], x.stride(0), x.stride(1), *_how(x))

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """Put scale * (softmax - one-hot) in the place of logits, [n, V]; returns rows' losses, fp64 [n]."""
        losses = torch.empty(len(logits), dtype=torch.float64)
        places = (_at(tensor) for tensor in (logits, targets.contiguous(), losses))
        self._library.cross_entropy(*places, *_rows(logits), scale, *_how(logits))
        return losses

    def running_softmax(
        self, logits: torch.Tensor, targets: torch.Tensor, first: int, state: Sequence[torch.Tensor]
    ) -> None:
        """Put e^(logit - largest) in the place of the next columns of logits, [n, w], and 0 in those of targets.

        Args:
            targets: int64 [n].
            first: the first column's number.
            state: largest logit, sum without targets, targets' logits, and factors on what came before; fp32 [n] each.
        """
        places = (_at(tensor) for tensor in (logits, targets, *state))
        self._library.running_softmax(*places, *_rows(logits), first, *_how(logits))

    def accumulate_rows(self, part: torch.Tensor, factors: torch.Tensor, total: torch.Tensor) -> None:
        """total = total * factors + part; part and total [n, D], total and factors, [n], in fp32."""
        places = (_at(tensor) for tensor in (part, factors, total))
        self._library.accumulate_rows(*places, *_rows(part), *_how(part))

    def softmax(self, scores: torch.Tensor, spans: torch.Tensor, out: torch.Tensor) -> None:
        """out = softmax(scores), [..., n, keys], of the keys that a row sees and 0 for others; out may be scores.

        Args:
            spans: int64 [2, n], the first key that each row sees and the one after the last.
        """
        room = torch.empty(torch.get_num_threads() * scores.shape[-1])
        places = (_at(tensor) for tensor in (scores, out, spans[0], spans[1], room))
        self._library.softmax(*places, *_rows(scores), spans.shape[1], *_how(scores))

    def quantize_rows(
        self, x: torch.Tensor, columns: torch.Tensor | None, packed: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Round rows of x, times columns, fp32 [K], to packed, int8 [T, K], and their scales, fp32 [T, 1]."""
        places = (_at(tensor) for tensor in (x, columns, packed, scales))
        self._library.quantize_rows(*places, *_rows(x), *_how(x))

    def scale_sums(
        self, sums: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None, out: torch.Tensor, *, add: bool
    ) -> None:
        """out (+)= sums * scales * columns; sums int32 [T, N], scales fp32 [T, 1], columns fp32 [N]."""
        places = (_at(tensor) for tensor in (sums, scales, columns, out))
        self._library.scale_sums(*places, *_rows(out), add, *_how(out))

    def widen(self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """out = packed * scales; packed int8 [N, K], scales fp32 [N, 1]."""
        places = (_at(tensor) for tensor in (packed, scales, out))
        self._library.widen(*places, *_rows(out), *_how(out))

    def accumulate(self, part: torch.Tensor, factor: float, total: torch.Tensor) -> None:
        """total += factor * part; total is fp32, of any contiguous shape with as many numbers."""
        self._library.accumulate(_at(part), _at(total), part.numel(), factor, *_how(part))

    def adamw8bit(
        self,
        weights: torch.Tensor,
        grads: torch.Tensor,
        moments: Sequence[torch.Tensor],
        noise: Sequence[torch.Tensor],
        numbers: Sequence[float],
    ) -> None:
        """Update weights, [n]; arguments as in training/adamw8bit.py.

        Args:
            moments: codes and largest values of the first and the second.
            noise: for both codes, and for weights in bf16.
            numbers: both betas, 1 - beta^step of both, epsilon, the factor of weight decay, the learning rate.
        """
        places = (_at(tensor) for tensor in (weights, grads, *moments, *noise))
        self._library.adamw8bit(*places, weights.numel(), *numbers, *_how(weights))


def _at(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers lie; the caller keeps it alive."""
    return None if tensor is None else tensor.data_ptr()


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """How many rows of the last dimension, and its size."""
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def _gaps(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows that lie at one distance, how far apart such groups are, and how far the rows of one."""
    if x.is_contiguous():
        return 1, x.shape[-1], 0
    return x.shape[1], x.stride(0), x.stride(1)


def _how(x: torch.Tensor) -> tuple[int, int]:
    """The kind of numbers, and how many threads are worth their start."""
    return KINDS[x.dtype], max(1, min(torch.get_num_threads(), x.numel() // ELEMENTS_A_THREAD))
