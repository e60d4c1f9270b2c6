"""A gated delta net in answering: from what its projections give to what its output layer reads, without gradients.

A sequence carries two states from call to call, which both functions change in place: the convolution's last rows, and
the recurrence's state.

Shapes: n new tokens of one sequence, B sequences with one new token each, M channels (queries, then keys, then values),
w tokens that the convolution sees, H value heads, d and e the sizes of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.delta.rule import EPSILON, chunk, step
from qingtune.kernels.native import delta_step


@dataclass(frozen=True)
class DeltaCore:
    """What a gated delta net has besides its linear layers, in fp32 (fp64 for fp64).

    Attributes:
        sizes: of the layer.
        taps: the convolution's weight, [w, M], the newest token's last.
        rate: -exp(A_log), [H].
        bias: dt_bias, [H].
        weight: of the norm, [e].
        epsilon: of the norm.
    """

    sizes: DeltaNet
    taps: torch.Tensor
    rate: torch.Tensor
    bias: torch.Tensor
    weight: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, net: Any, sizes: DeltaNet) -> DeltaCore:
        """Of a module of Transformers (Qwen3_5GatedDeltaNet)."""
        dtype = torch.promote_types(net.A_log.dtype, torch.float32)
        wide = [x.detach().to(dtype) for x in (net.conv1d.weight[:, 0].t(), net.A_log, net.dt_bias, net.norm.weight)]
        taps, a_log, bias, weight = wide
        return cls(sizes, taps.contiguous(), -a_log.exp(), bias, weight, float(net.norm.variance_epsilon))

    def new_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both states before a sequence's first token, zero: [w - 1, M] and [H, d, e]."""
        sizes = self.sizes
        state = self.taps.new_zeros(sizes.value_heads, sizes.key_size, sizes.value_size)
        return torch.zeros_like(self.taps[1:]), state

    def chunk(
        self,
        qkv: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        rows: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """Any number of new tokens of one sequence.

        Args:
            qkv: [n, M] of any dtype, before the convolution.
            z: [n, H e].
            b: [n, H], likewise a.
            rows: [w - 1, M], changed in place.
            state: [H, d, e], changed in place.

        Returns:
            What the output layer reads, [n, H e] in qkv's dtype.
        """
        q, k, v = self._heads(self._convolve(qkv, rows))
        out, after = chunk(q, k, v, *self._gates(b, a), state)
        state.copy_(after)
        return self._gated(out, z).to(qkv.dtype)

    def step(
        self,
        qkv: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        rows: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """One new token of each of B sequences; as chunk, with B for n, rows [B, w - 1, M], states [B, H, d, e].

        In C where the machine can compile it.
        """
        inputs, held = (qkv, z, b, a), (rows, states)
        if delta_step.fits(self.sizes, inputs, held):
            weights = self.taps, self.rate, self.bias, self.weight
            return delta_step.step(self.sizes, inputs, held, weights, EPSILON, self.epsilon)
        q, k, v = self._heads(self._convolve(qkv[:, None], rows)[:, 0])
        return self._gated(step(q, k, v, *self._gates(b, a), states), z).to(qkv.dtype)

    def _convolve(self, qkv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """SiLU of the convolution, [..., n, M]."""
        count = qkv.shape[-2]
        window = torch.cat([rows, qkv.to(rows.dtype)], -2)
        rows.copy_(window[..., count:, :])
        out = window[..., :count, :] * self.taps[0]
        for place in range(1, len(self.taps)):
            out.addcmul_(window[..., place : place + count, :], self.taps[place])
        return F.silu(out)

    def _heads(self, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys of length 1, [n, K, d], and values [n, H, e]."""
        sizes = self.sizes
        width = sizes.key_heads * sizes.key_size
        q, k, v = active.split([width, width, active.shape[-1] - 2 * width], -1)
        q, k = (x.unflatten(-1, (-1, sizes.key_size)) for x in (q, k))
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (q, k))
        return q * sizes.key_size**-0.5, k, v.unflatten(-1, (-1, sizes.value_size))

    def _gates(self, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """g and beta, [n, H]."""
        dtype = self.bias.dtype
        return F.softplus(a.to(dtype) + self.bias).mul_(self.rate), b.to(dtype).sigmoid()

    def _gated(self, read: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The norm of each head, times silu(z): [n, H e]."""
        normed = F.rms_norm(read, read.shape[-1:], self.weight, self.epsilon)
        return normed.mul_(F.silu(z.to(read.dtype)).view(read.shape)).flatten(-2)
