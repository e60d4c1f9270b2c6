"""The MLP of a decoder layer with its norms, forward and backward written out.

It keeps gate and up and computes the rest again.

Shapes: T tokens of the layout, D hidden size, I size of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch

from qingtune.kernels.architecture import MLP
from qingtune.kernels.block_sizes import MLPSizes
from qingtune.kernels.blocks import Parts, Pass, Residual
from qingtune.kernels.elementwise import Norm, swiglu, swiglu_backward


class MLPBlock:
    """x -> x + down(f(gate(norm(x))) * up(norm(x))); what down gives may be normed."""

    def __init__(
        self, layer: Any, number: int, this: MLP, parts: Parts, *, norm: Norm, out_norm: Norm | None = None
    ) -> None:
        self.number, self.this, self.dtype, self.workspace = number, this, parts.dtype, parts.workspace
        self.norm, mlp = norm, layer.mlp
        gate_up = [mlp.gate_up_proj] if this.fused else [mlp.gate_proj, mlp.up_proj]
        self.gate_up, down = parts.projections(gate_up, [mlp.down_proj])
        self.end = Residual(down, "down", out_norm, self.workspace)

    @property
    def sizes(self) -> MLPSizes:
        """What it takes memory for."""
        return MLPSizes(self.gate_up.sizes, self.end.layer.sizes, normed_output=self.end.norm is not None)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str) -> None:
        """x: [T, D] -> out: [T, D]."""
        self.end.forward(slot, self._expand(x, now, slot), x, out, now.dropout_seed(self.number, 3))

    def forward_again(self, x: torch.Tensor, now: Pass, slot: str) -> None:
        """As much of forward as backward needs to have been done."""
        self.end.forward_again(slot, self._expand(x, now, slot), x, now.dropout_seed(self.number, 3))

    def _expand(self, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """The hidden layer, [T, I]; gate and up are kept under the slot."""
        gate, up, outs = self._gate_and_up(slot, len(x))
        self.gate_up.forward(slot + ".gate_up", self.norm.forward(x), outs, now.dropout_seed(self.number, 2))
        if self.this.fused:
            for part, mine in zip((gate, up), outs[0].chunk(2, 1), strict=True):
                part.copy_(mine)
        hidden = self._take("mlp.hidden", len(x))
        return swiglu(gate, up, hidden, hidden, self.this.activation)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """grad: gradient of out, which becomes that of x; gate, and mostly up, give way to theirs."""
        gate, up, outs = self._gate_and_up(slot, len(x))
        activated, hidden = self._take("mlp.activated", len(x)), self._take("mlp.hidden", len(x))
        swiglu(gate, up, activated, hidden, self.this.activation)
        grad_hidden = self._take("mlp.grad_hidden", len(x))
        self.end.backward(slot, hidden, grad, grad_hidden, now.dropout_seed(self.number, 3))
        grads = [gate, swiglu_backward(grad_hidden, gate, up, activated, self.this.activation)]
        if self.this.fused:
            grads = [torch.cat(grads, 1, out=outs[0])]
        grad_normed = self.workspace.take("mlp.grad_normed", x.shape, self.dtype)
        seed = now.dropout_seed(self.number, 2)
        self.gate_up.backward(slot + ".gate_up", self.norm.forward(x), grads, grad_normed, seed)
        return self.norm.add_backward(grad, grad_normed, x)

    def _gate_and_up(self, slot: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Where gate and up are kept, [T, I], and what gate_up writes, which is both at once where it is one layer."""
        gate, up = self._take(slot + ".gate", rows), self._take(slot + ".up", rows)
        if not self.this.fused:
            return gate, up, [gate, up]
        return gate, up, [self.workspace.take("mlp.gate_up", (rows, 2 * self.this.size), self.dtype)]

    def _take(self, name: str, rows: int) -> torch.Tensor:
        return self.workspace.take(name, (rows, self.this.size), self.dtype)
