"""Linear layers of a model: found, and matched by name. Errors name what exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.names import match_names
from qingtune.kernels.linear import QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but the head, by full name, in the model's order."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR) and layer is not head}


def match_layers(model: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers to adapt.

    Args:
        model: the model.
        names: last parts (q_proj) or longer ends (layers.0.self_attn.q_proj) of layer names; None for all.

    Raises:
        UserError: a name matches nothing.
    """
    layers = linear_layers(model)
    return {name: layers[name] for name in match_names(list(layers), names)}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def dense_weight(layer: nn.Module) -> Any:
    """A linear layer's weight as [out, in]; GPT-2's Conv1D holds it the other way round."""
    weight: Any = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight
