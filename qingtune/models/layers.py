"""Linear layers of a model: found, replaced, and their dense weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.kernels.linear import QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but the head, by full name, in the model's order."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR) and layer is not head}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def dense_weight(layer: nn.Module) -> Any:
    """A linear layer's weight as [out, in]; GPT-2's Conv1D holds it the other way round."""
    weight: Any = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a model's files hold, by full name."""
    stored = model.state_dict()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in stored}
