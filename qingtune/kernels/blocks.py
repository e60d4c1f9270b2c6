"""The two blocks of a decoder layer, attention and MLP with their norms, forward and backward written out.

Each keeps its input, what attention needs, gate and up, and computes the rest again. `slot` is the name under which a
block's tensors stay in the workspace from its forward to its backward.

Shapes: T tokens of the layout, N trained ones, D hidden size, I size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qingtune.kernels.block_attention import BlockAttention, Heads
from qingtune.kernels.elementwise import Norm, rotate, swiglu, swiglu_backward
from qingtune.kernels.flash_attention import FlashAttention
from qingtune.kernels.layout import Layout
from qingtune.kernels.projection import Projection
from qingtune.kernels.workspace import Workspace

# Groups of modules that read one input -> their projections.
MakeProjections = Callable[..., list[Projection]]


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share: the layout, cos and sin [T, 1, d / 2], and the seed of its dropout masks."""

    layout: Layout
    rotary: tuple[torch.Tensor, torch.Tensor]
    seed: int | None

    def dropout_seed(self, layer: int, part: int) -> int | None:
        """The seed of one mask of a layer; `part` selects the mask."""
        return None if self.seed is None else (self.seed + 8 * layer + part) % 2**62


class AttentionBlock:
    """x -> x + o(attention(qkv(norm(x)))); in the last layer only rows that predict go beyond keys and values.

    Flash attention, if wanted, is for layers in which all rows do.
    """

    def __init__(
        self,
        layer: Any,
        number: int,
        dtype: torch.dtype,
        workspace: Workspace,
        projections: MakeProjections,
        *,
        flash: bool,
    ) -> None:
        attention = layer.self_attn
        self.number, self.dtype, self.workspace, self.flash = number, dtype, workspace, flash
        self.norm = Norm.of(layer.input_layernorm, workspace)
        self.q_norm, self.k_norm = (
            Norm.of(getattr(attention, name), workspace) if name in dict(attention.named_children()) else None
            for name in ("q_norm", "k_norm")
        )
        q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
        self.q, self.kv, self.qkv, self.o = projections([q], [k, v], [q, k, v], [o])
        size = attention.head_dim
        q_out, k_out = (self.qkv.members[i].shape[0] for i in (0, 1))
        self.heads = Heads(q_out // size, k_out // size, size, float(attention.scaling))
        self.attention: Any = (FlashAttention if flash else BlockAttention)(self.heads, workspace)

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
        cos, sin = now.rotary[0], -now.rotary[1] if back else now.rotary[1]
        q_cos, q_sin = (cos, sin) if rows is None else (cos[rows], sin[rows])
        return (
            rotate(q, q_cos, q_sin, self._take("attention.rotated_q", *q.shape)),
            rotate(k, cos, sin, self._take("attention.rotated_k", *k.shape)),
        )


class MLPBlock:
    """x -> x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(
        self, layer: Any, number: int, dtype: torch.dtype, workspace: Workspace, projections: MakeProjections
    ) -> None:
        self.number, self.dtype, self.workspace = number, dtype, workspace
        self.norm = Norm.of(layer.post_attention_layernorm, workspace)
        self.gate_up, self.down = projections([layer.mlp.gate_proj, layer.mlp.up_proj], [layer.mlp.down_proj])
        self.size = self.down.members[0].shape[1]

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
