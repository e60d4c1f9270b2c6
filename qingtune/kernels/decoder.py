"""The decoder of Qwen2, Qwen3 and Llama models as two blocks a layer, forward and backward written out.

The modules of the model only hold the weights; nothing of theirs is called but the rotary table. Each block keeps its
input, what attention needs, gate and up, and computes the rest again: 28 KB a token and layer at 0.5B parameters, in
buffers that every pass uses again. The head sees only rows that predict a trained token, and in the last layer only
those rows are computed beyond keys and values.

Shapes: T tokens of the layout, N trained ones, D hidden size, I size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qingtune.data.batch import Batch
from qingtune.kernels.attention import depends_on_longest
from qingtune.kernels.block_attention import BlockAttention, Blocks, Heads
from qingtune.kernels.dropout import new_seed
from qingtune.kernels.elementwise import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from qingtune.kernels.layout import Layout, lay_out
from qingtune.kernels.loss import chunked_head_loss
from qingtune.kernels.projection import Member, Projection, gradient
from qingtune.kernels.workspace import Workspace

# Architectures checked (tests/invariant) to give here what Transformers gives.
CHECKED_MODEL_TYPES = frozenset({"qwen2", "qwen3", "llama"})


def why_not(model: Any) -> str | None:
    """The reason why a model cannot be computed here; None if it can."""
    config = model.config
    if config.model_type not in CHECKED_MODEL_TYPES:
        return f'"{config.model_type}" is not one of the architectures with kernels of their own'
    kinds = set(config.to_dict().get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"this model has layers of other kinds than full attention ({', '.join(sorted(kinds))})"
    if reason := depends_on_longest(config):
        return reason
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}, not silu"
    if config.attention_dropout:
        return "the model drops attention weights"
    if model.get_output_embeddings().bias is not None:
        return "the head has a bias"
    return None


@dataclass(frozen=True)
class Pass:
    """What all layers of a pass share: the layout, cos and sin [T, 1, d / 2], and the seed of its dropout masks."""

    layout: Layout
    rotary: tuple[torch.Tensor, torch.Tensor]
    seed: int | None

    def dropout_seed(self, layer: int, part: int) -> int | None:
        """The seed of one mask of a layer; part tells its masks apart."""
        return None if self.seed is None else (self.seed + 8 * layer + part) % 2**62

    def blocks(self, rows: torch.Tensor | None) -> Blocks:
        """Blocks of attention in which all tokens ask, or those that predict."""
        return self.layout.blocks if rows is None else self.layout.predicting_blocks


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's weight and epsilon."""

    weight: torch.Tensor
    epsilon: float
    workspace: Workspace

    @classmethod
    def of(cls, module: Any, workspace: Workspace) -> Norm:
        """The norm that a module of Transformers holds."""
        return cls(module.weight, float(module.variance_epsilon), workspace)

    def forward(self, x: torch.Tensor, name: str = "norm.out") -> torch.Tensor:
        """[..., D] -> [..., D], in the workspace under the name."""
        return rms_norm(x, self.weight, self.epsilon, self.workspace, name)

    def add_backward(self, total: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the gradient of x to total, a tensor like x."""
        grad_x = self.backward(grad, x)
        wide = self.workspace.take("norm.product", x.shape, grad_x.dtype).copy_(total)
        return total.copy_(grad_x.add_(wide))

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x in fp32 (fp64 for fp64); the weight's is added to it if it is trained."""
        grad_x, normalised = rms_norm_backward(grad, x, self.weight, self.epsilon, self.workspace)
        if self.weight.requires_grad:
            product = normalised.mul_(grad)
            gradient(self.weight).add_(product.flatten(0, -2).sum(0))
        return grad_x


class AttentionBlock:
    """x -> x + o(attention(qkv(norm(x)))); in the last layer only rows that predict go beyond keys and values."""

    def __init__(self, layer: Any, number: int, dtype: torch.dtype, workspace: Workspace, projections: Any) -> None:
        attention = layer.self_attn
        self.number, self.dtype, self.workspace = number, dtype, workspace
        self.norm = Norm.of(layer.input_layernorm, workspace)
        self.q_norm, self.k_norm = (
            Norm.of(getattr(attention, name), workspace) if name in dict(attention.named_children()) else None
            for name in ("q_norm", "k_norm")
        )
        self.q, self.kv, self.qkv, self.o = projections(
            [attention.q_proj],
            [attention.k_proj, attention.v_proj],
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
        )
        size = attention.head_dim
        q_out, k_out = (self.qkv.members[i].shape[0] for i in (0, 1))
        self.heads = Heads(q_out // size, k_out // size, size, float(attention.scaling))
        self.attention = BlockAttention(self.heads, workspace)

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str, rows: torch.Tensor | None) -> None:
        """x: [T, D] -> out: [T, D], or [N, D] where rows says which."""
        normed = self.norm.forward(x)
        q, k, v = self._project(normed, now, slot, rows)
        q, k = self._rotated(q, k, now, rows, slot)
        attended = self._take(slot + ".attended", len(q), self.heads.queries * self.heads.size)
        self.attention.forward(slot, now.blocks(rows), q, k, v, attended)
        out.copy_(x if rows is None else x[rows])
        self.o.forward(slot + ".o", attended, [out], now.dropout_seed(self.number, 1), add=True)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None, *, wanted: bool
    ) -> torch.Tensor | None:
        """grad: gradient of out -> gradient of x, [T, D], None if it is not wanted; grad may be overwritten."""
        heads = self.heads
        attended = self._take(slot + ".attended", len(grad), heads.queries * heads.size)
        grad_attended = self._take("attention.grad_out", *attended.shape)
        self.o.backward(slot + ".o", attended, [grad], grad_attended, now.dropout_seed(self.number, 1))
        grad_q, grad_k, grad_v = self.attention.backward(slot, now.blocks(rows), grad_attended, len(x), self.dtype)
        grad_q, grad_k = self._rotated_backward(grad_q, grad_k, now, rows, slot)
        grads = [part.flatten(1).to(self.dtype) for part in (grad_q, grad_k, grad_v)]
        normed = self.norm.forward(x)
        grad_normed = self._take("attention.grad_normed", *x.shape) if wanted else None
        seed = now.dropout_seed(self.number, 0)
        if rows is None:
            self.qkv.backward(slot + ".qkv", normed, grads, grad_normed, seed)
        else:
            self.kv.backward(slot + ".kv", normed, grads[1:], grad_normed, seed)
            grad_rows = None if grad_normed is None else self._take("attention.grad_rows", len(rows), x.shape[1])
            q_seed = now.dropout_seed(self.number, 4)
            self.q.backward(slot + ".q", normed[rows], grads[:1], grad_rows, q_seed)
            if grad_normed is not None and grad_rows is not None:
                grad_normed.index_add_(0, rows, grad_rows)
        if grad_normed is None:
            return None
        if rows is None:
            return self.norm.add_backward(grad, grad_normed, x)
        grad_x = self.norm.backward(grad_normed, x)
        return self._take("attention.grad_x", *x.shape).copy_(grad_x.index_add_(0, rows, grad.to(grad_x.dtype)))

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take(name, shape, self.dtype)

    def _project(
        self, normed: torch.Tensor, now: Pass, slot: str, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T or N, heads * d], keys and values [T, heads * d]."""
        q_count = len(normed) if rows is None else len(rows)
        width, narrow = self.heads.queries * self.heads.size, self.heads.keys * self.heads.size
        kept = slot if self.q_norm else "attention"  # norms on queries and keys need them in the backward pass
        q = self._take(kept + ".raw_q", q_count, width)
        k = self._take(kept + ".raw_k", len(normed), narrow)
        v = self._take("attention.raw_v", len(normed), narrow)
        seed = now.dropout_seed(self.number, 0)
        if rows is None:
            self.qkv.forward(slot + ".qkv", normed, [q, k, v], seed)
        else:
            self.kv.forward(slot + ".kv", normed, [k, v], seed)
            self.q.forward(slot + ".q", normed[rows], [q], now.dropout_seed(self.number, 4))
        return self._apart(q), self._apart(k), self._apart(v)

    def _apart(self, x: torch.Tensor) -> torch.Tensor:
        """[n, heads * d] -> [n, heads, d]."""
        return x.view(len(x), x.shape[1] // self.heads.size, self.heads.size)

    def _rotated(
        self, q: torch.Tensor, k: torch.Tensor, now: Pass, rows: torch.Tensor | None, slot: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q_norm and self.k_norm:
            q, k = self.q_norm.forward(q, "norm.q"), self.k_norm.forward(k, "norm.k")
        cos, sin = now.rotary
        q_cos, q_sin = (cos, sin) if rows is None else (cos[rows], sin[rows])
        return (
            rotate(q, q_cos, q_sin, self._take("attention.rotated_q", *q.shape)),
            rotate(k, cos, sin, self._take("attention.rotated_k", *k.shape)),
        )

    def _rotated_backward(
        self, grad_q: torch.Tensor, grad_k: torch.Tensor, now: Pass, rows: torch.Tensor | None, slot: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = now.rotary
        q_cos, q_sin = (cos, sin) if rows is None else (cos[rows], sin[rows])
        grad_q = rotate(grad_q, q_cos, -q_sin, self._take("attention.rotated_q", *grad_q.shape))
        grad_k = rotate(grad_k.to(self.dtype), cos, -sin, self._take("attention.rotated_k", *grad_k.shape))
        if self.q_norm and self.k_norm:
            raw_q, raw_k = (self._take(slot + name, *x.shape) for name, x in ((".raw_q", grad_q), (".raw_k", grad_k)))
            grad_q = grad_q.copy_(self.q_norm.backward(grad_q, raw_q))
            grad_k = grad_k.copy_(self.k_norm.backward(grad_k, raw_k))
        return grad_q, grad_k


class MLPBlock:
    """x -> x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, layer: Any, number: int, dtype: torch.dtype, workspace: Workspace, projections: Any) -> None:
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
        hidden = self._expand(x, now, slot)
        self.down.keep_low(slot + ".down", hidden, now.dropout_seed(self.number, 3))

    def _expand(self, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """The hidden layer, [T, I]; gate and up are kept under the slot."""
        gate, up = self._take(slot + ".gate", len(x)), self._take(slot + ".up", len(x))
        seed = now.dropout_seed(self.number, 2)
        self.gate_up.forward(slot + ".gate_up", self.norm.forward(x), [gate, up], seed)
        return swiglu(gate, up, self._take("mlp.hidden", len(x)))

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """grad: gradient of out, which becomes that of x; gate and up are overwritten."""
        gate, up = self._take(slot + ".gate", len(x)), self._take(slot + ".up", len(x))
        hidden = self._take("mlp.hidden", len(x))
        grad_hidden = self._take("mlp.grad_hidden", len(x))
        self._down_backward(grad, gate, up, hidden, grad_hidden, now, slot)
        normed = self.norm.forward(x)
        grad_normed = self._take_narrow(x)
        seed = now.dropout_seed(self.number, 2)
        self.gate_up.backward(slot + ".gate_up", normed, [gate, up], grad_normed, seed)
        return self.norm.add_backward(grad, grad_normed, x)

    def _down_backward(
        self,
        grad: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        hidden: torch.Tensor,
        grad_hidden: torch.Tensor,
        now: Pass,
        slot: str,
    ) -> None:
        """Gradients of gate and up in their places."""
        swiglu(gate, up, hidden)
        self.down.backward(slot + ".down", hidden, [grad], grad_hidden, now.dropout_seed(self.number, 3))
        swiglu_backward(grad_hidden, gate, up, self.workspace)

    def _take(self, name: str, rows: int) -> torch.Tensor:
        return self.workspace.take(name, (rows, self.size), self.dtype)

    def _take_narrow(self, x: torch.Tensor) -> torch.Tensor:
        return self.workspace.take("mlp.grad_normed", x.shape, self.dtype)


class Decoder:
    """A model's summed loss and its gradient, a micro-batch at a time.

    Args:
        model: one for which `why_not` gives None.
        dtype: in which activations are held and products computed; the weights may be wider.
        member: a linear layer of the model -> what a projection needs of it, its adapter included.
        dropout: of the adapters' inputs.
        int8_units: whether int8 weights are multiplied as such.
        recompute: of how many layers, counted from the first, nothing but the input is kept.
        most_tokens: in a pass, as far as known; buffers are made for so many at once.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        member: Callable[[nn.Module], Member],
        *,
        dropout: float = 0.0,
        int8_units: bool = False,
        recompute: int = 0,
        most_tokens: int = 0,
    ) -> None:
        self.dtype, self.dropout, self.recompute, self.most_tokens = dtype, dropout, recompute, most_tokens
        self.embedding: torch.Tensor = model.get_input_embeddings().weight
        self.head: torch.Tensor = model.get_output_embeddings().weight
        self.workspace = workspace = Workspace(self.embedding.device)

        def projections(*groups: Sequence[nn.Module]) -> list[Projection]:
            return [
                Projection([member(layer) for layer in group], dropout, workspace, int8_units=int8_units)
                for group in groups
            ]

        layers = list(enumerate(model.model.layers))
        self.attention = [AttentionBlock(layer, i, dtype, workspace, projections) for i, layer in layers]
        self.mlp = [MLPBlock(layer, i, dtype, workspace, projections) for i, layer in layers]
        self.norm = Norm.of(model.model.norm, workspace)
        self.rotary = model.model.rotary_emb
        trains = [any(p.requires_grad for p in layer.parameters()) for _, layer in layers]
        self.lowest_trained = trains.index(True) if any(trains) else len(layers)

    def kept_bytes(self, tokens: int) -> int:
        """What one layer keeps of a pass for its backward, its input not counted."""
        attention, mlp = self.attention[0], self.mlp[0]
        heads = attention.heads
        values = 2 * mlp.size + self.embedding.shape[1] + 2 * (heads.queries + heads.keys) * heads.size
        values += heads.queries * heads.size * (attention.q_norm is not None)
        values += sum(sum(part.ranks) for part in (attention.qkv, attention.o, mlp.gate_up, mlp.down))
        return values * tokens * self.dtype.itemsize

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of the trained tokens' losses, fp32 scalar; no dropout, nothing kept."""
        return self._forward(batch, None, None)

    @torch.no_grad()
    def add_gradients(self, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Add scale times the gradient of the summed loss to the trained parameters'; returns the summed loss.

        Dropout follows PyTorch's global generator.
        """
        if not len(batch.targets):
            return torch.zeros((), device=self.embedding.device)
        return self._forward(batch, new_seed() if self.dropout else None, scale)

    def _forward(self, batch: Batch, seed: int | None, scale: torch.Tensor | None) -> torch.Tensor:
        """The loss, and with a scale its gradient."""
        layout = lay_out(batch, share_prefix=seed is None)
        self.workspace.headroom = max(1.0, self.most_tokens / len(layout.token_ids))
        x = self._input(0, len(layout.token_ids), keep=scale is not None)
        x.copy_(F.embedding(layout.token_ids, self.embedding))
        now = Pass(layout, self._rotary_table(x, layout), seed)
        for number in range(len(self.mlp)):
            x = self._layer_forward(number, x, now, keep=scale is not None)
        grad = None if scale is None else self.workspace.take("grad_hidden", x.shape, self.dtype)
        loss = chunked_head_loss(
            self.norm.forward(x),
            self.head,
            layout.targets,
            self.workspace,
            scale=scale,
            grad_hidden=grad,
            grad_weight=gradient(self.head) if grad is not None and self.head.requires_grad else None,
        )
        if grad is not None:
            self._backward(grad, x, now)
        return loss

    def _backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass) -> None:
        """From the gradient of the normed final rows to those of all trained parameters; x: those rows, [N, D]."""
        grad.copy_(self.norm.backward(grad, x))
        trains_embedding = self.embedding.requires_grad
        for number in range(len(self.mlp) - 1, (-1 if trains_embedding else self.lowest_trained - 1), -1):
            slot, rows = self._slot(number, keep=True), self._rows(number, now)
            x = self._input(number, len(now.layout.token_ids), keep=True)
            middle = self._middle(slot, x, rows)
            if number < self.recompute:
                self.attention[number].forward(x, now, middle, slot, rows)
                self.mlp[number].forward_again(middle, now, slot)
            grad = self.mlp[number].backward(grad, middle, now, slot)
            wanted = number > self.lowest_trained or trains_embedding
            below = self.attention[number].backward(grad, x, now, slot, rows, wanted=wanted)
            if below is None:
                return
            grad = below
        gradient(self.embedding).index_add_(0, now.layout.token_ids, grad.to(self.embedding.dtype))

    def _layer_forward(self, number: int, x: torch.Tensor, now: Pass, *, keep: bool) -> torch.Tensor:
        slot, rows = self._slot(number, keep=keep), self._rows(number, now)
        middle = self._middle(slot, x, rows)
        self.attention[number].forward(x, now, middle, slot, rows)
        out = self._input(number + 1, len(middle), keep=keep)
        self.mlp[number].forward(middle, now, out, slot)
        return out

    def _rows(self, number: int, now: Pass) -> torch.Tensor | None:
        """In the last layer, the rows that predict; elsewhere None, for all."""
        return now.layout.predicting if number == len(self.mlp) - 1 else None

    def _slot(self, number: int, *, keep: bool) -> str:
        """Where a layer keeps what its backward needs; shared by layers of which nothing is kept."""
        return f"layer{number}" if keep and number >= self.recompute else "layer"

    def _input(self, number: int, rows: int, *, keep: bool) -> torch.Tensor:
        """A layer's input, [rows, D]; where nothing is kept, two buffers take turns."""
        name = f"layer{number}.input" if keep else f"input{number % 2}"
        return self.workspace.take(name, (rows, self.embedding.shape[1]), self.dtype)

    def _middle(self, slot: str, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """What stands between the two blocks of a layer."""
        shape = (len(x) if rows is None else len(rows), x.shape[1])
        return self.workspace.take(slot + ".middle", shape, self.dtype)

    def _rotary_table(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, [T, 1, d / 2]; the model's table repeats them for the second half of a head."""
        cos, sin = self.rotary(x[None], layout.positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half].to(self.dtype), sin[0, :, None, :half].to(self.dtype)
