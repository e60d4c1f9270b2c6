"""The attention of a decoder layer with its norms, forward and backward written out.

It keeps what attention needs and computes the rest again.

Shapes: T tokens of the layout, N trained ones, D hidden size, d size of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_attention import BlockAttention
from qingtune.kernels.block_sizes import AttentionSizes
from qingtune.kernels.blocks import Parts, Pass, Residual
from qingtune.kernels.elementwise import Norm, rotate
from qingtune.kernels.flash_attention import FlashAttention

Rows = torch.Tensor | None  # int64 [N], which rows of the layout ask; None for all


class AttentionBlock:
    """x -> x + o(attention(qkv(norm(x)))); in the last layer only rows that predict go beyond keys and values.

    Flash attention, if wanted, is for layers in which all rows do. What was attended may be multiplied by the sigmoid
    of gates, which q_proj gives after each head's queries; what o gives may be normed.
    """

    def __init__(
        self,
        layer: Any,
        number: int,
        this: Attention,
        parts: Parts,
        *,
        norm: Norm,
        out_norm: Norm | None = None,
        flash: bool = False,
    ) -> None:
        attention = layer.self_attn
        self.number, self.this, self.flash = number, this, flash
        self.dtype, self.workspace, self.norm = parts.dtype, parts.workspace, norm
        self.q_norm, self.k_norm = (
            parts.norm(getattr(attention, name)) if this.normed else None for name in ("q_norm", "k_norm")
        )
        if this.fused:
            self.qkv, o = parts.projections([attention.qkv_proj], [attention.o_proj])
        else:
            q, k, v = (getattr(attention, f"{name}_proj") for name in "qkv")
            self.q, self.kv, self.qkv, o = parts.projections([q], [k, v], [q, k, v], [attention.o_proj])
        self.end = Residual(o, "o", out_norm, self.workspace)
        self.attention: Any = (FlashAttention if flash else BlockAttention)(this, self.workspace)

    @property
    def sizes(self) -> AttentionSizes:
        """What it takes memory for."""
        return AttentionSizes(self.this, self.qkv.sizes, self.end.layer.sizes, self.end.norm is not None)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str, rows: Rows) -> None:
        """x: [T, D] -> out: [T, D], or [N, D] where rows says which."""
        q, k, v = self._project(self.norm.forward(x), now, slot, rows)
        kept = "attention.rotated" if self.flash else slot
        q, k = self._rotate(q, k, now, rows, kept)
        attended = self._take(slot + ".attended", len(q), self.this.queries * self.this.size)
        self.attention.forward(slot, self._places(now, rows), q, k, v, attended)
        read = self._gated(slot, attended)
        self.end.forward(slot, read, x if rows is None else x[rows], out, now.dropout_seed(self.number, 1))

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str, rows: Rows, *, wanted: bool
    ) -> torch.Tensor | None:
        """grad: gradient of out -> gradient of x, [T, D], None if it is not wanted; grad may be overwritten."""
        attended = self._take(slot + ".attended", len(grad), self.this.queries * self.this.size)
        grad_attended = self._take("attention.grad_out", *attended.shape)
        read = self._gated(slot, attended)
        self.end.backward(slot, read, grad, grad_attended, now.dropout_seed(self.number, 1))
        if self.this.gated:
            self._gate_backward(slot, grad_attended, attended)
        places = self._places(now, rows)
        grad_q, grad_k, grad_v = self.attention.backward(slot, places, attended, grad_attended, len(x))
        grad_q, grad_k = self._rotate(grad_q, grad_k.to(self.dtype), now, rows, "attention.rotated", back=True)
        if self.q_norm and self.k_norm:
            raw_q, raw_k = (
                self._queries_and_gates(slot, len(grad_q))[:, :, 0],
                self._take(slot + ".raw_k", *grad_k.shape),
            )
            grad_q = grad_q.copy_(self.q_norm.backward(grad_q, raw_q))
            grad_k = grad_k.copy_(self.k_norm.backward(grad_k, raw_k))
        if self.this.gated:
            both = self._queries_and_gates("attention.grad", len(grad_q))
            both[:, :, 0].copy_(grad_q)
            grad_q = both
        grads = [part.flatten(1).to(self.dtype) for part in (grad_q, grad_k, grad_v)]
        grad_normed = self._project_backward(self.norm.forward(x), grads, now, slot, rows, wanted=wanted)
        if grad_normed is None:
            return None
        if rows is None:
            return self.norm.add_backward(grad, grad_normed, x)
        grad_x = self.norm.backward(grad_normed, x)
        return self._take("attention.grad_x", *x.shape).copy_(grad_x.index_add_(0, rows, grad.to(grad_x.dtype)))

    def _places(self, now: Pass, rows: Rows) -> Any:
        """Which keys each row sees, as the kind of attention wants it."""
        if self.flash:
            return now.layout.lengths
        return now.layout.blocks(self.this.window, predicting=rows is not None)

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take(name, shape, self.dtype)

    # --- Queries, keys and values ------------------------------------------------------------------------------------

    def _project(
        self, normed: torch.Tensor, now: Pass, slot: str, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T or N, heads, d], keys and values [T, heads, d]; queries and keys normed, if the model does."""
        seed, widths = now.dropout_seed(self.number, 0), self._widths()
        if self.this.fused:
            together = self._take("attention.raw_qkv", len(normed), sum(widths))
            self.qkv.forward(slot + ".qkv", normed, [together], seed)
            q, k, v = together.split(widths, 1)
            q = q if rows is None else q[rows]
        else:
            # Norms on queries and keys need them in the backward pass, and so do gates.
            kept_q, kept_k = (
                slot if kept else "attention" for kept in (self.this.normed or self.this.gated, self.this.normed)
            )
            q = self._take(kept_q + ".raw_q", len(normed if rows is None else rows), widths[0])
            k = self._take(kept_k + ".raw_k", len(normed), widths[1])
            v = self._take("attention.raw_v" if self.flash else slot + ".v", len(normed), widths[2])
            if rows is None:
                self.qkv.forward(slot + ".qkv", normed, [q, k, v], seed)
            else:
                self.kv.forward(slot + ".kv", normed, [k, v], seed)
                self.q.forward(slot + ".q", normed[rows], [q], now.dropout_seed(self.number, 4))
        q, k, v = (x.unflatten(1, (-1, self.this.size)) for x in (q, k, v))
        if self.this.gated:
            q = q.unflatten(1, (-1, 2))[:, :, 0]
        if self.q_norm and self.k_norm:
            q, k = self.q_norm.forward(q, "norm.q"), self.k_norm.forward(k, "norm.k")
        return q, k, v

    def _project_backward(
        self, normed: torch.Tensor, grads: list[torch.Tensor], now: Pass, slot: str, rows: Rows, *, wanted: bool
    ) -> torch.Tensor | None:
        """Gradients of queries, keys and values, [T or N, heads * d] -> that of the normed input, if it is wanted."""
        grad_normed = self._take("attention.grad_normed", *normed.shape) if wanted else None
        seed = now.dropout_seed(self.number, 0)
        if self.this.fused:
            together = self._take("attention.grad_qkv", len(normed), sum(self._widths()))
            for part, grad in zip(together.split(self._widths(), 1), grads, strict=True):
                if rows is None or len(grad) == len(part):
                    part.copy_(grad)
                else:
                    part.zero_().index_copy_(0, rows, grad)
            grads, rows = [together], None
        if rows is None:
            self.qkv.backward(slot + ".qkv", normed, grads, grad_normed, seed)
            return grad_normed
        self.kv.backward(slot + ".kv", normed, grads[1:], grad_normed, seed)
        grad_rows = self._take("attention.grad_rows", len(rows), normed.shape[1]) if wanted else None
        self.q.backward(slot + ".q", normed[rows], grads[:1], grad_rows, now.dropout_seed(self.number, 4))
        if grad_normed is None or grad_rows is None:
            return None
        return grad_normed.index_add_(0, rows, grad_rows)

    def _widths(self) -> tuple[int, int, int]:
        """Of all queries, keys and values."""
        keys = self.this.keys * self.this.size
        return self.this.queries * self.this.size * (1 + self.this.gated), keys, keys

    def _queries_and_gates(self, slot: str, rows: int) -> torch.Tensor:
        """What q_proj gave, [N, heads, 1, d], or [N, heads, 2, d] with gates."""
        return self._take(slot + ".raw_q", rows, self.this.queries, 1 + self.this.gated, self.this.size)

    def _gated(self, slot: str, attended: torch.Tensor) -> torch.Tensor:
        """attended * sigmoid(gate), [N, heads * d]; without gates, what was attended."""
        if not self.this.gated:
            return attended
        return torch.mul(
            attended, self._sigmoid(slot, len(attended)), out=self._take("attention.gated", *attended.shape)
        )

    def _gate_backward(self, slot: str, grad: torch.Tensor, attended: torch.Tensor) -> None:
        """Turn the gradient of what is gated into that of what was attended; that of the gates goes next to what will
        be the queries'."""
        sigmoid = self._sigmoid(slot, len(grad))
        gates = torch.mul(grad, attended, out=self._take("attention.gated", *grad.shape)).mul_(sigmoid)
        gates.addcmul_(gates, sigmoid, value=-1)
        both = self._queries_and_gates("attention.grad", len(grad))
        both[:, :, 1].copy_(gates.view_as(both[:, :, 1]))
        grad.mul_(sigmoid)

    def _sigmoid(self, slot: str, rows: int) -> torch.Tensor:
        """Of the gates, [N, heads * d]."""
        gate = self._queries_and_gates(slot, rows)[:, :, 1]
        return self._take("attention.sigmoid", *gate.shape).copy_(gate).sigmoid_().flatten(1)

    def _rotate(
        self, q: torch.Tensor, k: torch.Tensor, now: Pass, rows: Rows, to: str, *, back: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn queries and keys to their positions, into buffers of the name `to`; back for their gradients."""
        table = now.rotary[self.this.rotary]
        q_cos, q_sin = table.queries if rows is None else (part[rows] for part in table.queries)
        k_cos, k_sin = table.keys
        if back:
            q_sin, k_sin = -q_sin, -k_sin
        return (
            rotate(q, q_cos, q_sin, self._take(to + ".q", *q.shape)),
            rotate(k, k_cos, k_sin, self._take(to + ".k", *k.shape)),
        )
