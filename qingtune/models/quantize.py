"""Put quantised layers in the place of a model's linear layers, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qingtune.kernels.device import give_back_memory
from qingtune.kernels.experts.modules import MATRICES, QuantizedExperts
from qingtune.kernels.linear import QuantizedLinear, quantized_class
from qingtune.models.layers import dense_weight, expert_modules, linear_layers, replace_layer, stored_tensors

# A layer's name, its out and in features, its bias on the device -> the layer; None for one that stays dense.
Ready = Callable[[str, tuple[int, int], torch.Tensor | None], QuantizedLinear | None]


def quantize_model(model: Any, bits: int, device: torch.device) -> None:
    """Hold every linear layer but the head, and experts, in 4 or 8 bits; then move the model to the device.

    Each weight goes to the device by itself, so that the device never holds the 16-bit model. On the meta device the
    layers have sizes only.
    """
    layers = linear_layers(model)
    for name in list(layers):
        replace_layer(model, name, _replaced(layers.pop(name), bits, device))
    experts = expert_modules(model)
    for name in list(experts):
        module = experts.pop(name)
        held = [_each(getattr(module, part).detach(), bits, device) for part in MATRICES]
        replace_layer(model, name, QuantizedExperts(module.act_fn, *held))
    model.to(device)


def _replaced(layer: Any, bits: int, device: torch.device) -> QuantizedLinear:
    """A layer for a linear one, whose dense weight can go once nothing else holds it."""
    return _quantized(dense_weight(layer).detach(), layer.bias, bits, device)


def fill_quantized(
    model: Any,
    bits: int,
    device: torch.device,
    read: Callable[[str], torch.Tensor],
    ready: Ready | None = None,
) -> None:
    """Fill a model whose weights have no value yet, its linear layers but the head quantised, one tensor at a time.

    Args:
        model: as `models.load.empty_model` makes it.
        read: a parameter's name -> the tensor.
        ready: returns layers from packed tensors that exist already; None to quantise what `read` returns.
    """
    layers = linear_layers(model)
    for name in list(layers):
        if (mine := _filled(name, layers.pop(name), bits, device, read, ready)) is not None:
            replace_layer(model, name, mine)
    for name, module in expert_modules(model).items():
        held = [_fill_experts(f"{name}.{part}", getattr(module, part), bits, device, read, ready) for part in MATRICES]
        if held[0] and held[1]:
            replace_layer(model, name, QuantizedExperts(module.act_fn, held[0], held[1]))
    quantized = tuple(name for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    for name, tensor in stored_tensors(model).items():
        if name.rpartition(".")[0] not in quantized:
            tensor.data = read(name).to(tensor.dtype)
    model.to(device)


def _filled(
    name: str,
    layer: Any,
    bits: int,
    device: torch.device,
    read: Callable[[str], torch.Tensor],
    ready: Ready | None,
) -> QuantizedLinear | None:
    """A layer for a linear one without values, which gets its bias; None where it stays dense.

    The dense weight is gone when this returns.
    """
    if layer.bias is not None:
        layer.bias.data = read(f"{name}.bias").to(layer.bias.dtype)
    if ready:
        out_features, in_features = dense_weight(layer).shape
        return ready(name, (out_features, in_features), _on(layer.bias, device))
    layer.weight.data = read(f"{name}.weight").to(layer.weight.dtype)
    return _quantized(dense_weight(layer).detach(), layer.bias, bits, device)


def _fill_experts(
    name: str,
    weights: torch.Tensor,
    bits: int,
    device: torch.device,
    read: Callable[[str], torch.Tensor],
    ready: Ready | None,
) -> list[QuantizedLinear]:
    """Layers for one matrix of each expert; name: of the parameter [E, out, in]. Empty where they stay dense."""
    if not ready:
        return _each(read(name).to(weights.dtype), bits, device)
    out_features, in_features = weights.shape[1:]
    found = [ready(f"{name}.{number}", (out_features, in_features), None) for number in range(len(weights))]
    return [layer for layer in found if layer is not None]


def _each(weights: torch.Tensor, bits: int, device: torch.device) -> list[QuantizedLinear]:
    """[E, out, in] -> a layer for each expert."""
    return [_quantized(weight, None, bits, device) for weight in weights]


def _quantized(weight: torch.Tensor, bias: torch.Tensor | None, bits: int, device: torch.device) -> QuantizedLinear:
    quantized = quantized_class(bits)(weight.to(device), _on(bias, device))
    if device.type != "meta":
        # The copies that this took leave holes between what stays: in the end 2.3 bytes for each weight of the model.
        give_back_memory()
    return quantized


def _on(bias: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if bias is None else bias.detach().to(device)
