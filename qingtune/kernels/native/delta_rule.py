"""A gated delta net between its projections in C (delta_rule.c), where a machine can compile it and tensors fit.

The one place that decides: `delta_rule` gives the functions for some tensors, or None, and callers then use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.layout import Layout
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.kernels.native.delta import FLAGS, KINDS, LARGEST_HEAD
from qingtune.machine.resources import cpu_flags

SOURCE = Path(__file__).with_name("delta_rule.c")
LARGEST_KERNEL = 16  # tokens that a convolution sees
GROUP = 16  # numbers of a head, of which products take whole ones
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIZES = _I * 7


def delta_rule(this: DeltaNet, *tensors: torch.Tensor) -> DeltaRuleKernels | None:
    """The functions in C for a layer of these sizes and these tensors: on a CPU, all in fp32 or all in bf16."""
    sizes, dtype = (this.key_size, this.value_size), tensors[0].dtype
    fits = all(size % GROUP == 0 and size <= LARGEST_HEAD for size in sizes) and this.kernel <= LARGEST_KERNEL
    fits = fits and dtype in KINDS and all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)
    return compiled() if fits and all(x.is_contiguous() for x in tensors) else None


@functools.cache
def compiled() -> DeltaRuleKernels | None:
    """The functions in C, compiled at the first call; None where that cannot be."""
    if sys.platform != "linux" or not {"avx2", "fma"} <= cpu_flags():
        return None
    found = compiled_library(SOURCE, _declare, (*FLAGS, *flags_of_hidden_units()))
    return None if isinstance(found, str) else DeltaRuleKernels(found)


def _declare(library: ctypes.CDLL) -> None:
    library.delta_room.argtypes, library.delta_room.restype = [_P], _I
    for function, places in ((library.delta_forward, 9), (library.delta_backward, 13)):
        function.argtypes, function.restype = [*[_P] * places, _F, _I, _I], None


@dataclass(frozen=True)
class Given:
    """What both directions take of a layer and a pass; M channels, T tokens, K key heads, R value heads a key head.

    Attributes:
        this: sizes of the layer.
        layout: where samples lie.
        qkv: [T, M], fp32 or bf16.
        taps: of the convolution, fp32 [w, M], the newest token's last.
        decay: g, fp32 [K, R, T]; beta likewise.
        states: [1 + T // CHUNK, K, R, d, e] in qkv's dtype, written in the forward pass.
        epsilon: added to squared lengths of queries and keys.
    """

    this: DeltaNet
    layout: Layout
    qkv: torch.Tensor
    taps: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor
    states: torch.Tensor
    epsilon: float

    def places(self) -> list[int]:
        """Where all but the states lie."""
        return [x.data_ptr() for x in (self.qkv, self.taps, self.decay, self.beta)]


class DeltaRuleKernels:
    """delta_rule.c on tensors for which `delta_rule` gives it.

    Heads are shared among PyTorch's threads, and results do not depend on how many.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def forward(self, given: Given, out: torch.Tensor) -> None:
        """Write what each token reads, [T, H e], and the states."""
        places = [*given.places(), given.states.data_ptr(), out.data_ptr()]
        self._call(self._library.delta_forward, given, places)

    def backward(
        self, given: Given, grad: torch.Tensor, grad_qkv: torch.Tensor, grad_taps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of g and log beta, fp32 [K, R, T]; that of qkv is written, that of taps added, if it is wanted.

        grad: of what forward gave, in its dtype.
        """
        of_decay, of_beta = torch.empty_like(given.decay), torch.empty_like(given.beta)
        places = [grad.data_ptr(), *given.places(), given.states.data_ptr(), grad_qkv.data_ptr()]
        places += [of_decay.data_ptr(), of_beta.data_ptr(), 0 if grad_taps is None else grad_taps.data_ptr()]
        self._call(self._library.delta_backward, given, places)
        return of_decay, of_beta

    def _call(self, function: Callable[..., None], given: Given, places: list[int]) -> None:
        this, segments = given.this, given.layout.segments
        share = this.value_heads // this.key_heads
        tokens, heads = len(given.qkv), this.key_heads
        sizes = _SIZES(tokens, len(segments), heads, share, this.key_size, this.value_size, this.kernel)
        lying = (_I * (3 * len(segments)))(*(n for s in segments for n in (s.start, s.end, s.shared)))
        threads = min(torch.get_num_threads(), heads)
        room = torch.empty(threads * self._library.delta_room(sizes))
        function(*places, lying, sizes, room.data_ptr(), given.epsilon, KINDS[given.qkv.dtype], threads)
