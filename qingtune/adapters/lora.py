"""The LoRA layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + (alpha / r) B A dropout(x)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.targets import dense_weight, match_layers, replace_layer
from qingtune.kernels.dropout import dropout
from qingtune.kernels.linear import QuantizedLinear
from qingtune.kernels.projection import Adapter, Member


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank addition.

    Attributes:
        lora_A: fp32 [r, in], uniform as nn.Linear starts.
        lora_B: fp32 [out, r], zero at the start, so that training begins at the base model.
    """

    def __init__(
        self, base: nn.Module, r: int, alpha: float, dropout_probability: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base
        self.r, self.scaling = r, alpha / r
        out_features, in_features = _shape(base)
        device = next(base.parameters(), next(base.buffers(), torch.empty(0))).device
        start = nn.init.kaiming_uniform_(torch.empty(r, in_features), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(device))  # drawn on the CPU, so that every device starts alike
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.dropout_probability = dropout_probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]; the adapter is computed in x's dtype, its gradients are fp32."""
        dropped = dropout(x, self.dropout_probability) if self.training else x
        low = dropped @ self.lora_A.to(x.dtype).t()
        return self.base(x) + (low @ self.lora_B.to(x.dtype).t()) * self.scaling

    def delta(self) -> torch.Tensor:
        """What merging adds to the weight, fp32 [out, in]."""
        return self.lora_B.float() @ self.lora_A.float() * self.scaling


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Out and in features."""
    if isinstance(layer, QuantizedLinear):
        return layer.out_features, layer.in_features
    out_features, in_features = dense_weight(layer).shape
    return out_features, in_features


def add_lora(
    model: Any, names: Sequence[str] | None, r: int, alpha: float, dropout: float, *, seed: int = 0
) -> dict[str, LoRALinear]:
    """Freeze the model and wrap its layers; returns the adapters by the layers' full names.

    Raises:
        UserError: a name matches no layer.
    """
    layers = match_layers(model, names)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters = {name: LoRALinear(layer, r, alpha, dropout, generator) for name, layer in layers.items()}
    for name, adapter in adapters.items():
        replace_layer(model, name, adapter)
    return adapters


def lora_layers(model: Any) -> dict[str, LoRALinear]:
    """The adapters of a model by the names of the layers they wrap."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add every adapter to its layer's weight, in fp32 arithmetic, and take the adapters out again.

    Raises:
        TypeError: a layer is quantised; merge into the 16-bit base instead.
    """
    for name, adapter in lora_layers(model).items():
        base = adapter.base
        if isinstance(base, QuantizedLinear):
            raise TypeError(f"{name} is quantised")
        delta = adapter.delta()
        weight = cast("torch.Tensor", base.weight)
        weight.copy_((weight.float() + (delta.t() if isinstance(base, Conv1D) else delta)).to(weight.dtype))
        replace_layer(model, name, base)


def member(layer: nn.Module) -> Member:
    """A linear layer, wrapped or not, as the decoder's projections take it."""
    if isinstance(layer, LoRALinear):
        return Member(layer.base, Adapter(layer.lora_A, layer.lora_B, layer.scaling))
    return Member(layer, None)
