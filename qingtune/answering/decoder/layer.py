"""A decoder's layer for answering: norms, and the blocks between them, of matrices that may be packed.

Shapes: T new tokens, D hidden size, H query heads, G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qingtune.answering.decoder.joining import Joining
from qingtune.answering.decoder.native.experts import NativeExperts
from qingtune.answering.decoder.native.matrices import FEW_ROWS
from qingtune.answering.decoder.packed import Matrix, plus
from qingtune.kernels.architecture import Activation, Attention, Experts
from qingtune.kernels.delta.answer import DeltaCore
from qingtune.kernels.native.elementwise import native

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class AnswerNorm:
    """RMSNorm (Zhang & Sennrich 2019).

    Attributes:
        weight: the factor on each number, 1 + w where a model's norms are such; its dtype is that in which the product
            is computed, as models were trained: Llama's and Qwen's round before it, those with 1 + w after it.
    """

    weight: torch.Tensor
    epsilon: float

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension, computed in fp32 at least; in x's dtype."""
        if self.weight.dtype == torch.float32 and (c := native(x)):
            out = torch.empty_like(x)
            c.norm(x, self.weight, self.epsilon, out)
            return out
        wide = x.float()
        rate = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.epsilon)
        return (wide * rate.rsqrt_()).to(self.weight.dtype).mul_(self.weight).to(x.dtype)


@dataclass(frozen=True)
class AttentionBlock:
    """Attention with its projections.

    Attributes:
        number: of the layer, among those with attention.
        qkv: gives queries, keys and values in this order; of a gated one, each head's queries and then its gate.
    """

    attention: Attention
    number: int
    qkv: Matrix
    q_norm: AnswerNorm | None
    k_norm: AnswerNorm | None
    o: Matrix

    def forward(
        self, x: torch.Tensor, joining: Joining, added: torch.Tensor | None, *, only_last: bool = False
    ) -> torch.Tensor:
        """Normed rows [T, D] -> [T, D], with only_last [1, D]; what is added has the shape of the result."""
        shape, gate = self.attention, None
        heads = self.qkv.multiply(x).view(len(x), -1, shape.size)
        if shape.gated:
            own, heads = heads.split([2 * shape.queries, 2 * shape.keys], 1)
            q, gate = own.unflatten(1, (-1, 2)).unbind(2)
            asking = [q, heads[:, : shape.keys]]
        else:
            asking = [heads[:, : shape.queries + shape.keys]]  # values have no positions
        if self.q_norm and self.k_norm:
            q, k = asking if shape.gated else asking[0].split([shape.queries, shape.keys], 1)
            asking = [self.q_norm.apply(q), self.k_norm.apply(k)]
        turned = joining.turn(asking[0] if len(asking) == 1 else torch.cat(asking, 1), shape)
        q, k = turned.split([shape.queries, shape.keys], 1)
        if only_last:
            q, gate = q[-1:], None if gate is None else gate[-1:]
        out = joining.attend(self.number, shape, q, k, heads[:, -shape.keys :])
        if gate is not None:
            out = out * gate.flatten(1).sigmoid()
        return self.o.multiply(out, added)


@dataclass(frozen=True)
class DeltaBlock:
    """A gated delta net with its projections.

    Attributes:
        number: of the layer, among delta nets.
        qkv_z: gives what the convolution sees (queries, keys, values) and then the output's gate.
        b_a: gives each head's b and then a.
    """

    core: DeltaCore
    number: int
    qkv_z: Matrix
    b_a: Matrix
    out: Matrix

    def forward(
        self, x: torch.Tensor, joining: Joining, added: torch.Tensor | None, *, only_last: bool = False
    ) -> torch.Tensor:
        """Normed rows [T, D] -> [T, D], with only_last [1, D]; what is added has the shape of the result."""
        sizes, inputs = self.core.sizes, self.qkv_z.multiply(x)
        gate = sizes.value_heads * sizes.value_size
        qkv, z = inputs.split([inputs.shape[1] - gate, gate], 1)
        out = joining.recur(self.number, self.core, qkv, z, *self.b_a.multiply(x).chunk(2, dim=1))
        return self.out.multiply(out[-1:] if only_last else out, added)


@dataclass(frozen=True)
class MLPBlock:
    """down(activation(gate(x)) * up(x)); `gate_up` gives gate and up in this order."""

    gate_up: Matrix
    down: Matrix
    activation: Activation

    def forward(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Normed rows [T, D] -> [T, D]."""
        gate, up = self.gate_up.multiply(x).chunk(2, dim=1)
        if c := native(gate, up):  # of one row
            c.gated(gate, up, gate, activation=self.activation)
            return self.down.multiply(gate, added)
        return self.down.multiply(ACTIVATIONS[self.activation](gate).mul_(up), added)


@dataclass(frozen=True)
class ExpertsBlock:
    """A mixture of experts; each expert's rows are multiplied together, and experts that no row chose are not read.

    Attributes:
        router: gives each expert's logit.
        shared: the expert of all rows; `shared_gate` gives the logit of its share.
        native: the same for a few rows, in C.
    """

    experts: Experts
    router: Matrix
    mlps: Sequence[MLPBlock]
    shared: MLPBlock | None
    shared_gate: Matrix | None
    native: NativeExperts | None = None

    def forward(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Normed rows [T, D] -> [T, D]."""
        if self.native and len(x) <= FEW_ROWS:
            return plus(self.native.forward(x).to(x.dtype), added)
        shares, chosen = self.router.multiply(x).float().softmax(1).topk(self.experts.chosen, dim=1)
        if self.experts.normalised:
            shares /= shares.sum(1, keepdim=True)
        y = self._grouped(x, chosen, shares)
        if self.shared and self.shared_gate:
            y.add_(self.shared.forward(x, None).mul_(self.shared_gate.multiply(x).sigmoid()))
        return plus(y, added)

    def _grouped(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Rows [T, D], each one's experts and their shares [T, k]: the sum of what these give, [T, D]."""
        # Places [T * chosen] in order of experts, so that each expert's lie together.
        places = chosen.flatten().argsort(stable=True)
        rows = places.div(self.experts.chosen, rounding_mode="floor")
        counts = chosen.flatten().bincount(minlength=self.experts.count).tolist()
        parts = zip(self.mlps, x[rows].split(counts), strict=True)
        out = torch.cat([mlp.forward(part, None) for mlp, part in parts if len(part)])
        out.mul_(shares.flatten()[places, None].to(out.dtype))
        return torch.zeros_like(x).index_add_(0, rows, out)


@dataclass(frozen=True)
class AnswerLayer:
    """x + mixer(norm(x)), then x + mlp(norm(x)); with output norms, what both give is normed before it is added."""

    input_norm: AnswerNorm
    mixer: AttentionBlock | DeltaBlock
    mlp_norm: AnswerNorm
    mlp: MLPBlock | ExpertsBlock
    mixer_output_norm: AnswerNorm | None = None
    mlp_output_norm: AnswerNorm | None = None

    def forward(self, x: torch.Tensor, joining: Joining, *, only_last: bool = False) -> torch.Tensor:
        """Rows [T, D]; with only_last the last one alone goes beyond what the cache keeps: [1, D]."""
        normed = self.input_norm.apply(x)
        if only_last:
            x = x[-1:]
        if self.mixer_output_norm and self.mlp_output_norm:
            x = x + self.mixer_output_norm.apply(self.mixer.forward(normed, joining, None, only_last=only_last))
            return x + self.mlp_output_norm.apply(self.mlp.forward(self.mlp_norm.apply(x), None))
        x = self.mixer.forward(normed, joining, x, only_last=only_last)
        return self.mlp.forward(self.mlp_norm.apply(x), x)
