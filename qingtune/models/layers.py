"""Linear layers of a model: found, replaced, and their dense weights."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.kernels.experts.modules import MATRICES, QuantizedExperts
from qingtune.kernels.linear import QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)
# Architectures of which an expert was checked (tests/invariant) to be down(activation(gate(x)) * up(x)).
MIXTURES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"})
# Those of which nothing but the experts has other names in files than in the model.
JOINED = MIXTURES - {"mixtral"}
BALANCE = (
    "config.json asks for the load-balancing loss of the experts' router (output_router_logits), which is not added "
    "here: the loss is that of the tokens alone."
)


def wants_balance(config: Any) -> bool:
    """Whether a model's configuration, or what it says of the text, adds a load-balancing loss to Transformers' own."""
    text = config.get_text_config(decoder=True)
    return any(
        getattr(part, "output_router_logits", False) and getattr(part, "router_aux_loss_coef", 0.0)
        for part in (config, text)
    )


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but the head and the experts of mixtures, by full name, in the model's order."""
    experts = {
        layer for module in model.modules() if isinstance(module, QuantizedExperts) for layer in module.modules()
    }
    outside = {model.get_output_embeddings(), *experts}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR) and layer not in outside}


def expert_modules(model: Any) -> dict[str, Any]:
    """Modules of a mixture's experts, by full name, in the model's order; of architectures not known here, none.

    They hold gates and ups as one parameter [E, 2 I, D] and downs as another, [E, D, I], or are `QuantizedExperts`.
    """
    if model.config.model_type not in MIXTURES:
        return {}
    return {name: module for name, module in model.named_modules() if _holds_experts(module)}


def _holds_experts(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    stacked = tuple(parameters) == MATRICES and all(parameter.ndim == 3 for parameter in parameters.values())
    return stacked or isinstance(module, QuantizedExperts)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another's place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's weights lie."""
    return next(chain(layer.parameters(), layer.buffers())).device


def dense_weight(layer: nn.Module) -> Any:
    """A linear layer's weight as [out, in]; GPT-2's Conv1D holds it the other way round."""
    weight: Any = layer.weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a model's files hold, by full name."""
    stored = model.state_dict()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in stored}
