"""The MLP of a decoder layer with its norm, forward and backward written out.

It keeps gate and up and computes the rest again.

Shapes: T tokens of the layout, D hidden size, I size of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch

from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.buffers import MLPSizes
from qingtune.kernels.elementwise import swiglu, swiglu_backward


class MLPBlock:
    """x -> x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, layer: Any, number: int, parts: Parts) -> None:
        self.number, self.dtype, self.workspace = number, parts.dtype, parts.workspace
        self.norm = parts.norm(layer.post_attention_layernorm)
        self.gate_up, self.down = parts.projections([layer.mlp.gate_proj, layer.mlp.up_proj], [layer.mlp.down_proj])
        self.size = self.down.members[0].shape[1]

    @property
    def sizes(self) -> MLPSizes:
        """What it takes memory for."""
        return MLPSizes(self.gate_up.sizes, self.down.sizes)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str) -> None:
        """x: [T, D] -> out: [T, D]."""
        hidden = self._expand(x, now, slot)
        out.copy_(x)
        self.down.forward(slot + ".down", hidden, [out], now.dropout_seed(self.number, 3), add=True)

    def forward_again(self, x: torch.Tensor, now: Pass, slot: str) -> None:
        """As much of forward as backward needs to have been done."""
        self.down.keep_low(slot + ".down", self._expand(x, now, slot), now.dropout_seed(self.number, 3))

    def _expand(self, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """The hidden layer, [T, I]; gate and up are kept under the slot."""
        gate, up, hidden = (self._take(name, len(x)) for name in (slot + ".gate", slot + ".up", "mlp.hidden"))
        seed = now.dropout_seed(self.number, 2)
        self.gate_up.forward(slot + ".gate_up", self.norm.forward(x), [gate, up], seed)
        return swiglu(gate, up, hidden, hidden)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """grad: gradient of out, which becomes that of x; gate gives way to its gradient."""
        gate, up = self._take(slot + ".gate", len(x)), self._take(slot + ".up", len(x))
        activated = self._take("mlp.activated", len(x))
        hidden = swiglu(gate, up, activated, self._take("mlp.hidden", len(x)))
        grad_hidden = self._take("mlp.grad_hidden", len(x))
        self.down.backward(slot + ".down", hidden, [grad], grad_hidden, now.dropout_seed(self.number, 3))
        swiglu_backward(grad_hidden, gate, up, activated)
        grad_normed = self.workspace.take("mlp.grad_normed", x.shape, self.dtype)
        seed = now.dropout_seed(self.number, 2)
        self.gate_up.backward(slot + ".gate_up", self.norm.forward(x), [gate, activated], grad_normed, seed)
        return self.norm.add_backward(grad, grad_normed, x)

    def _take(self, name: str, rows: int) -> torch.Tensor:
        return self.workspace.take(name, (rows, self.size), self.dtype)
