"""Frozen matrices held in the 16 bits in which they are stored, in a model that computes in fp32.

Widening loses nothing, so that a run gives bit for bit what it gives on fp32 weights, for half the memory. The training
kernels read such weights as they are; the modules here widen theirs for each call, for code that calls the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qingtune.kernels.experts.modules import MATRICES, FrozenExperts
from qingtune.models.layers import expert_modules, replace_layer


class StoredLinear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its weight's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class StoredEmbedding(nn.Embedding):
    """An embedding that gives fp32 rows, whatever its weight's dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids -> fp32 [..., D]."""
        return super().forward(input).float()


class StoredExperts(FrozenExperts):
    """A mixture's frozen experts that compute in their input's dtype, widened one at a time.

    Args:
        experts: Transformers' module, whose parameters it takes over.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__(experts.act_fn)
        for name in MATRICES:
            self.register_parameter(name, getattr(experts, name))


_OF = {nn.Linear: StoredLinear, nn.Embedding: StoredEmbedding}


def compute_in_fp32(model: Any) -> None:
    """Have a model in 16 bits compute in fp32: matrices of linear layers, experts and embeddings stay as they are, all
    else is widened. Layers of other kinds, which may do more with their weight, are widened too."""
    kept: set[int] = set()
    for name, experts in expert_modules(model).items():
        stored = StoredExperts(experts)
        replace_layer(model, name, stored)
        kept.update(id(parameter) for parameter in stored.parameters())
    for module in model.modules():
        if type(module) in _OF:
            module.__class__ = _OF[type(module)]
            kept.add(id(module.weight))
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.float()
