"""Linear layers of a model: found, and matched by name. Errors name what exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qingtune.adapters.names import match_names
from qingtune.models.layers import linear_layers


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
