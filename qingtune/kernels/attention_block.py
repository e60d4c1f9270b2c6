"""The attention of a decoder layer with its norm, forward and backward written out.

It keeps what attention needs and computes the rest again.

Shapes: T tokens of the layout, N trained ones, D hidden size, d size of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_attention import BlockAttention, Heads
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.buffers import AttentionSizes
from qingtune.kernels.elementwise import rotate
from qingtune.kernels.flash_attention import FlashAttention


class AttentionBlock:
    """x -> x + o(attention(qkv(norm(x)))); in the last layer only rows that predict go beyond keys and values.

    Flash attention, if wanted, is for layers in which all rows do.
    """

    def __init__(self, layer: Any, number: int, this: Attention, parts: Parts, *, flash: bool) -> None:
        attention = layer.self_attn
        self.number, self.this, self.flash = number, this, flash
        self.dtype, self.workspace = parts.dtype, parts.workspace
        self.norm = parts.norm(layer.input_layernorm)
        self.q_norm, self.k_norm = (
            parts.norm(getattr(attention, name)) if this.normed else None for name in ("q_norm", "k_norm")
        )
        q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
        self.q, self.kv, self.qkv, self.o = parts.projections([q], [k, v], [q, k, v], [o])
        self.heads = Heads(this.queries, this.keys, this.size, this.scale)
        self.attention: Any = (FlashAttention if flash else BlockAttention)(self.heads, self.workspace)

    @property
    def sizes(self) -> AttentionSizes:
        """What it takes memory for."""
        return AttentionSizes(self.heads.queries, self.this.normed, self.qkv.sizes, self.o.sizes)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str, rows: torch.Tensor | None) -> None:
        """x: [T, D] -> out: [T, D], or [N, D] where rows says which."""
        q, k, v = self._project(self.norm.forward(x), now, slot, rows)
        q, k = self._rotate(q, k, now, rows)
        attended = self._take(slot + ".attended", len(q), self.heads.queries * self.heads.size)
        self.attention.forward(slot, self._places(now, rows), q, k, v, attended)
        out.copy_(x if rows is None else x[rows])
        self.o.forward(slot + ".o", attended, [out], now.dropout_seed(self.number, 1), add=True)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None, *, wanted: bool
    ) -> torch.Tensor | None:
        """grad: gradient of out -> gradient of x, [T, D], None if it is not wanted; grad may be overwritten."""
        attended = self._take(slot + ".attended", len(grad), self.heads.queries * self.heads.size)
        grad_attended = self._take("attention.grad_out", *attended.shape)
        self.o.backward(slot + ".o", attended, [grad], grad_attended, now.dropout_seed(self.number, 1))
        places = self._places(now, rows)
        grad_q, grad_k, grad_v = self.attention.backward(slot, places, grad_attended, len(x), self.dtype)
        grad_q, grad_k = self._rotate(grad_q, grad_k.to(self.dtype), now, rows, back=True)
        if self.q_norm and self.k_norm:
            raw_q, raw_k = (self._take(slot + name, *x.shape) for name, x in ((".raw_q", grad_q), (".raw_k", grad_k)))
            grad_q = grad_q.copy_(self.q_norm.backward(grad_q, raw_q))
            grad_k = grad_k.copy_(self.k_norm.backward(grad_k, raw_k))
        grads = [part.flatten(1).to(self.dtype) for part in (grad_q, grad_k, grad_v)]
        normed = self.norm.forward(x)
        grad_normed = self._take("attention.grad_normed", *x.shape) if wanted else None
        seed = now.dropout_seed(self.number, 0)
        if rows is None:
            self.qkv.backward(slot + ".qkv", normed, grads, grad_normed, seed)
            return None if grad_normed is None else self.norm.add_backward(grad, grad_normed, x)
        self.kv.backward(slot + ".kv", normed, grads[1:], grad_normed, seed)
        grad_rows = self._take("attention.grad_rows", len(rows), x.shape[1]) if wanted else None
        self.q.backward(slot + ".q", normed[rows], grads[:1], grad_rows, now.dropout_seed(self.number, 4))
        if grad_normed is None or grad_rows is None:
            return None
        grad_x = self.norm.backward(grad_normed.index_add_(0, rows, grad_rows), x)
        return self._take("attention.grad_x", *x.shape).copy_(grad_x.index_add_(0, rows, grad.to(grad_x.dtype)))

    def _places(self, now: Pass, rows: torch.Tensor | None) -> Any:
        """Which keys each row sees, as the kind of attention wants it."""
        if self.flash:
            return now.layout.lengths
        return now.layout.blocks if rows is None else now.layout.predicting_blocks

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take(name, shape, self.dtype)

    def _project(
        self, normed: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T or N, heads, d], keys and values [T, heads, d]; queries and keys normed, if the model does."""
        width, narrow = self.heads.queries * self.heads.size, self.heads.keys * self.heads.size
        kept = slot if self.q_norm else "attention"  # norms on queries and keys need them in the backward pass
        q = self._take(kept + ".raw_q", len(normed if rows is None else rows), width)
        k = self._take(kept + ".raw_k", len(normed), narrow)
        v = self._take("attention.raw_v", len(normed), narrow)
        seed = now.dropout_seed(self.number, 0)
        if rows is None:
            self.qkv.forward(slot + ".qkv", normed, [q, k, v], seed)
        else:
            self.kv.forward(slot + ".kv", normed, [k, v], seed)
            self.q.forward(slot + ".q", normed[rows], [q], now.dropout_seed(self.number, 4))
        q, k, v = (x.unflatten(1, (-1, self.heads.size)) for x in (q, k, v))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm.forward(q, "norm.q"), self.k_norm.forward(k, "norm.k")
        return q, k, v

    def _rotate(
        self, q: torch.Tensor, k: torch.Tensor, now: Pass, rows: torch.Tensor | None, *, back: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn queries and keys to their positions; back for their gradients."""
        cos, sin = now.rotary[self.this.rotary]
        sin = -sin if back else sin
        q_cos, q_sin = (cos, sin) if rows is None else (cos[rows], sin[rows])
        return (
            rotate(q, q_cos, q_sin, self._take("attention.rotated_q", *q.shape)),
            rotate(k, cos, sin, self._take("attention.rotated_k", *k.shape)),
        )
