"""The experts that a few rows of a mixture are sent to, in one call of C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from qingtune.answering.decoder.native.matrices import MatrixStruct, NativeMatrix


class _MixtureStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(MatrixStruct)) for name in ("gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("rows", "experts", "shares")),
        *((name, ctypes.c_int64) for name in ("count", "pairs")),
    ]


class NativeExperts:
    """All experts of a mixture, MLPs with SwiGLU.

    Args:
        gate_up: of each expert, [2 I, D]; likewise down, [D, I]. They have to live as long as this does.
    """

    def __init__(self, library: ctypes.CDLL, gate_up: Sequence[NativeMatrix], down: Sequence[NativeMatrix]) -> None:
        self._library = library
        structs = MatrixStruct * len(gate_up)
        self._gate_up, self._down = (structs(*(one.struct() for one in matrices)) for matrices in (gate_up, down))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Rows [T, D] and each one's experts and their shares, [T, k]: the sum of what they give, fp32 [T, D]."""
        x, y = x.float().contiguous(), torch.zeros(x.shape)
        experts, places = chosen.flatten().sort(stable=True)  # an expert's rows after each other: it is in the caches
        rows = places.div(chosen.shape[1], rounding_mode="floor")
        shares = shares.float().flatten()[places]
        held = (part.data_ptr() for part in (rows, experts, shares))
        mixture = ctypes.byref(_MixtureStruct(self._gate_up, self._down, *held, len(x), len(rows)))
        scratch = torch.empty(self._library.mixture_scratch_bytes(mixture), dtype=torch.uint8)
        at = [ctypes.c_void_p(part.data_ptr()) for part in (x, y, scratch)]
        self._library.add_mixture(mixture, *at[:2], ctypes.c_int64(torch.get_num_threads()), at[2])
        return y
