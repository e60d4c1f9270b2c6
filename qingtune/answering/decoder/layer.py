"""The weights of a decoder's layer, for answering."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qingtune.answering.decoder.packed import Matrix


@dataclass(frozen=True)
class AnswerNorm:
    """RMSNorm (Zhang & Sennrich 2019): weight and epsilon."""

    weight: torch.Tensor
    epsilon: float

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension, computed in fp32 at least; rounded before the weight, as the models were trained."""
        wide = x.float()
        rate = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.epsilon)
        return (wide * rate.rsqrt_()).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True)
class AnswerLayer:
    """One layer's weights: `qkv` gives queries, keys and values in this order, `gate_up` gate and up."""

    input_norm: AnswerNorm
    qkv: Matrix
    q_norm: AnswerNorm | None
    k_norm: AnswerNorm | None
    o: Matrix
    mlp_norm: AnswerNorm
    gate_up: Matrix
    down: Matrix
