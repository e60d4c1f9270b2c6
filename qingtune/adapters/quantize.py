"""Put quantised layers in the place of a model's linear layers, one at a time."""

from __future__ import annotations

from typing import Any

import torch

from qingtune.adapters.targets import dense_weight, linear_layers, replace_layer
from qingtune.kernels.linear import quantize_layer


def quantize_model(model: Any, bits: int, device: torch.device) -> None:
    """Hold every linear layer but the head in 4 or 8 bits; then move the model to the device.

    Each weight goes to the device by itself, so that the device never holds the 16-bit model.
    """
    layers = linear_layers(model)
    for name in list(layers):
        layer = layers.pop(name)  # so that its dense weight can go
        bias: Any = layer.bias
        weight = dense_weight(layer).detach().to(device)
        own_bias = None if bias is None else bias.detach().to(device)
        replace_layer(model, name, quantize_layer(weight, own_bias, bits))
    model.to(device)
