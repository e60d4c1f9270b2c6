"""What the blocks of a decoder layer have in common: a mixer of tokens and an MLP, each with its norms and its residual
sum, forward and backward written out.

A block keeps what its backward needs in the workspace under `slot`, a name that is the layer's own or, where layers are
computed again, one they share; what it needs for a moment lies under names that all blocks use in turn. Its `sizes`
state both for the memory plan (kernels/buffers.py), which a test holds against the buffers that a pass made. Layers may
differ, so nothing of a block is read from another one.

Shapes: T tokens of the layout, N trained ones, D hidden size, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qingtune.kernels.buffers import BlockSizes
from qingtune.kernels.elementwise import Norm
from qingtune.kernels.layout import Layout
from qingtune.kernels.projection import Projection
from qingtune.kernels.workspace import Workspace


@dataclass(frozen=True)
class Parts:
    """What blocks are made of.

    Attributes:
        dtype: of activations.
        workspace: of all blocks.
        norm: a module of the model -> the norm of its weight.
        projections: groups of linear layers that read one input -> a projection for each.
    """

    dtype: torch.dtype
    workspace: Workspace
    norm: Callable[[Any], Norm]
    projections: Callable[..., list[Projection]]


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share: the layout, cos and sin [T, 1, d / 2] by the names of the rotary tables, and the
    seed of its dropout masks."""

    layout: Layout
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]
    seed: int | None

    def dropout_seed(self, layer: int, part: int) -> int | None:
        """The seed of one mask of a layer; `part`, 0 to 7, selects the mask."""
        return None if self.seed is None else (self.seed + 8 * layer + part) % 2**62


class Mixer(Protocol):
    """x -> x + what each token takes from the tokens before it."""

    @property
    def sizes(self) -> BlockSizes:
        """What it takes memory for."""
        ...

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str, rows: torch.Tensor | None) -> None:
        """x: [T, D] -> out: [T, D], or [N, D] in the last layer, where rows, int64 [N], says which."""
        ...

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None, *, wanted: bool
    ) -> torch.Tensor | None:
        """grad: gradient of out -> gradient of x, [T, D], None if it is not wanted; grad may be overwritten.

        Gradients of all trained parameters are added.
        """
        ...


class TokenBlock(Protocol):
    """x -> x + what each token gives by itself."""

    @property
    def sizes(self) -> BlockSizes:
        """What it takes memory for."""
        ...

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str) -> None:
        """x: [T, D] -> out: [T, D]; N for T in the last layer."""
        ...

    def forward_again(self, x: torch.Tensor, now: Pass, slot: str) -> None:
        """As much of forward as backward needs to have been done."""
        ...

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """grad: gradient of out, which becomes that of x; gradients of all trained parameters are added."""
        ...
