"""Losses and gradients of every family and method on the device, against the same weights in fp32 on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch

from gpu_parts.models import METHODS, batch_of, config_of, prepare, random_model
from gpu_parts.scale import Result, Scale, Shape
from qingtune.adapters.lora import lora_layers, member
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.kernels.device import Hardware
from qingtune.kernels.linear import QuantizedLinear
from qingtune.models.layers import replace_layer

_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
FAMILIES: dict[str, Shape] = {
    "Qwen2": ("qwen2", {name: size for name, size in _SIZES.items() if name != "head_dim"}),
    "Qwen3": ("qwen3", _SIZES),
    "Llama": ("llama", _SIZES),
    "Mistral, window": ("mistral", {**_SIZES, "sliding_window": 40}),
    "Gemma 3": ("gemma3_text", {**_SIZES, "sliding_window": 40, "query_pre_attn_scalar": 32}),
    "Phi-3": ("phi3", {**{name: size for name, size in _SIZES.items() if name != "head_dim"}, "pad_token_id": 0}),
    "Qwen3.5": ("qwen3_5_text", {**_SIZES, **_DELTA}),
    "Qwen3-MoE": (
        "qwen3_moe",
        {**_SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
}
# The last place of bf16 is 2^-8 of a number. Losses are means of many tokens; gradients pass through all layers.
LAST_PLACE = 2.0**-8
MOST_OF_LOSS, MOST_OF_GRADIENT = 1.0, 12.0  # last places
EXACT_LOSS, EXACT_GRADIENT = 1e-4, 5e-3  # where the device computes in fp32


def part(scale: Scale) -> Result:
    """A row for each family and method: the loss, and the relative error of loss and of all gradients as one vector."""
    result = Result()
    for family, shape in FAMILIES.items():
        for method in METHODS:
            loss, gradient = _apart(shape, method, scale)
            unit = LAST_PLACE if scale.hardware.dtype.itemsize == 2 else 1.0
            result.rows.append({"family": family, "method": method, "loss": loss / unit, "gradients": gradient / unit})
            most = (MOST_OF_LOSS, MOST_OF_GRADIENT) if unit < 1 else (EXACT_LOSS, EXACT_GRADIENT)
            if not (loss / unit <= most[0] and gradient / unit <= most[1]):
                result.faults.append(f"{family}, {method}: loss {loss:.2g}, gradients {gradient:.2g} off")
    return result


def _apart(shape: Shape, method: str, scale: Scale) -> tuple[float, float]:
    """Relative errors of the loss and of the gradients; both sides dequantise the same packed weights."""
    cpu = Scale(Hardware(torch.device("cpu"), torch.float32, ""), scale.scratch, shape, shape, (), (), scale.sample, 1)
    config = config_of(method)
    exact = prepare(random_model(shape, torch.bfloat16, cpu.device).float(), config, cpu)
    _move(exact)
    mine = _copy_on(scale.device, exact)
    if config.method != "full":
        for parameter in mine.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(scale.hardware.dtype)
    batch = batch_of(shape, 256, 64, cpu.device)
    right, found = (
        _gradients(model, dtype, batch.to(where))
        for model, dtype, where in (
            (exact, torch.float32, cpu.device),
            (mine, scale.hardware.dtype, scale.device),
        )
    )
    (loss, gradient), (my_loss, my_gradient) = right, found
    return abs(my_loss - loss) / abs(loss), float((my_gradient - gradient).norm() / gradient.norm())


def _copy_on(device: torch.device, model: Any) -> Any:
    """The same model on a device, packed weights unchanged."""
    copied = copy.deepcopy(model)
    for name, layer in [*copied.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            packed = {part: tensor.to(device) for part, tensor in layer.packed_tensors().items()}
            shape = layer.out_features, layer.in_features
            replace_layer(copied, name, type(layer).restore(shape, packed, layer.bias))
    return copied.to(device)


def _move(model: Any) -> None:
    """Give B matrices weights: at their start, half of the adapters' gradients are zero."""
    draw = torch.Generator().manual_seed(1)
    for adapter in lora_layers(model).values():
        adapter.lora_B.data.copy_(torch.randn(adapter.lora_B.shape, generator=draw) * 0.02)


def _gradients(model: Any, dtype: torch.dtype, batch: Any) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients in one vector, fp64 on the CPU."""
    loss = TrainingDecoder(model, dtype, member).add_gradients(batch, torch.tensor(1.0, device=batch.token_ids.device))
    gradients = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss), torch.cat(gradients)
