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
        int8_units: whether int8 weights are multiplied as such.
    """

    dtype: torch.dtype
    workspace: Workspace
    norm: Callable[[Any], Norm]
    projections: Callable[..., list[Projection]]
    int8_units: bool = False


Turns = tuple[torch.Tensor, torch.Tensor]  # cos and sin


@dataclass(frozen=True)
class RotaryTable:
    """Cos and sin, [T, 1, half of what is turned], of keys and of queries; the latter may hold a factor."""

    keys: Turns
    queries: Turns


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share: the layout, rotary tables by their names, and the seed of its dropout masks."""

    layout: Layout
    rotary: dict[str, RotaryTable]
    seed: int | None

    def dropout_seed(self, layer: int, part: int) -> int | None:
        """The seed of one mask of a layer; `part`, 0 to 7, selects the mask."""
        return None if self.seed is None else (self.seed + 8 * layer + part) % 2**62


class Residual:
    """How a block ends: out = x + layer(y), or x + norm(layer(y)), which keeps what the layer gave.

    Args:
        layer: a projection of one member, from y to [T, D].
        name: under which it keeps what it needs, within a slot.
    """

    def __init__(self, layer: Projection, name: str, norm: Norm | None, workspace: Workspace) -> None:
        self.layer, self.name, self.norm, self.workspace = layer, name, norm, workspace

    def forward(self, slot: str, y: torch.Tensor, x: torch.Tensor, out: torch.Tensor, seed: int | None) -> torch.Tensor:
        """y: [T, I], x: [T, D] -> out: [T, D]."""
        out.copy_(x)
        if self.norm is None:
            self.layer.forward(f"{slot}.{self.name}", y, [out], seed, add=True)
            return out
        given = self._given(slot, out)
        self.layer.forward(f"{slot}.{self.name}", y, [given], seed)
        return out.add_(self.norm.forward(given))

    def forward_again(self, slot: str, y: torch.Tensor, like: torch.Tensor, seed: int | None) -> None:
        """As much of forward as backward needs to have been done; like: a tensor like out."""
        if self.norm is None:
            self.layer.keep_low(f"{slot}.{self.name}", y, seed)
        else:
            self.layer.forward(f"{slot}.{self.name}", y, [self._given(slot, like)], seed)

    def backward(self, slot: str, y: torch.Tensor, grad: torch.Tensor, grad_y: torch.Tensor, seed: int | None) -> None:
        """grad: gradient of out, which is that of x, too -> grad_y: that of y."""
        if self.norm is not None:
            wide = self.norm.backward(grad, self._given(slot, grad))
            grad = self.workspace.take("residual.grad", grad.shape, grad.dtype).copy_(wide)
        self.layer.backward(f"{slot}.{self.name}", y, [grad], grad_y, seed)

    def _given(self, slot: str, like: torch.Tensor) -> torch.Tensor:
        return self.workspace.take(f"{slot}.{self.name}.out", like.shape, like.dtype)


class Mixer(Protocol):
    """x -> x + what each token takes from the tokens before it."""

    norm: Norm

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
