"""Linear layers of a model: found, and matched by name. Errors name what exists."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.errors import UserError
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
    if names is None:
        return layers
    problems = [name for name in names if not any(ends_with(layer, name) for layer in layers)]
    if problems:
        existing = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
        near = difflib.get_close_matches(problems[0], existing, n=1)
        guess = f' Did you mean "{near[0]}"?' if near else ""
        missing = ", ".join(f'"{name}"' for name in problems)
        raise UserError(
            f"{missing} matches no linear layer of this model",
            where="lora_target_modules",
            fix=f"There are {', '.join(existing)}.{guess}",
        )
    return {layer: module for layer, module in layers.items() if any(ends_with(layer, name) for name in names)}


def ends_with(layer: str, name: str) -> bool:
    """Whether a layer's full name is `name` or ends with it at a dot, as PEFT matches."""
    return layer == name or layer.endswith(f".{name}")


def is_within(name: str, module: str) -> bool:
    """Whether a full name is a module's or that of something in it."""
    return name == module or name.startswith(f"{module}.")


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def dense_weight(layer: nn.Module) -> Any:
    """A linear layer's weight as [out, in]; GPT-2's Conv1D holds it the other way round."""
    weight: Any = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight
