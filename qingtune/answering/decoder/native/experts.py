"""MLPs and mixtures of experts as the kernels in C read them, and a mixture for a few rows by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qingtune.answering.decoder.native.matrices import MatrixStruct, NativeMatrix
from qingtune.kernels.architecture import Activation, Experts

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
Pair = tuple[NativeMatrix, NativeMatrix]  # an MLP's gate_up [2 I, D] and down [D, I]


class MLPStruct(ctypes.Structure):
    """`MLP` of model.h."""

    _fields_ = [*((name, MatrixStruct) for name in ("gate_up", "down")), ("activation", ctypes.c_int64)]

    @classmethod
    def of(cls, pair: Pair, activation: Activation) -> MLPStruct:
        """To be used only as long as the matrices live."""
        return cls(*(matrix.struct() for matrix in pair), ACTIVATIONS[activation])


class MixtureStruct(ctypes.Structure):
    """`Mixture` of model.h."""

    _fields_ = [
        ("router", MatrixStruct),
        *((name, ctypes.POINTER(MLPStruct)) for name in ("experts", "shared")),
        ("shared_gate", MatrixStruct),
        *((name, ctypes.c_int64) for name in ("count", "chosen", "normalised")),
    ]


class NativeExperts:
    """A mixture of MLPs with SwiGLU, its router included.

    Args:
        mlps: of each expert.
        shared: the MLP that all rows go through, and what gives the logit of its share, [1, D].
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        experts: Experts,
        router: NativeMatrix,
        mlps: Sequence[Pair],
        shared: tuple[Pair, NativeMatrix] | None,
    ) -> None:
        self._library, self._held = library, (router, mlps, shared)
        all_experts = (MLPStruct * len(mlps))(*(MLPStruct.of(pair, "silu") for pair in mlps))
        of_all = ctypes.pointer(MLPStruct.of(shared[0], "silu")) if shared else None
        gate = shared[1].struct() if shared else MatrixStruct()
        numbers = experts.count, experts.chosen, experts.normalised
        self.struct = MixtureStruct(router.struct(), all_experts, of_all, gate, *numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [T, D]: the sum of what their experts give, times their shares, and of the shared one; fp32 [T, D]."""
        x, mixture = x.float().contiguous(), ctypes.byref(self.struct)
        y, (count, threads) = torch.empty_like(x), map(ctypes.c_int64, (len(x), torch.get_num_threads()))
        scratch = torch.empty(self._library.mixture_scratch_bytes(mixture, count, threads), dtype=torch.uint8)
        at = [ctypes.c_void_p(part.data_ptr()) for part in (x, scratch, y)]
        self._library.apply_mixture(mixture, at[0], count, threads, *at[1:])
        return y
