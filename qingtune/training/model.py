"""The model that a run trains: the base in the right dtype, quantised and with adapters as the settings ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qingtune.adapters.full_modules import find_modules, train_in_full
from qingtune.adapters.lora import LoRALinear, add_lora
from qingtune.adapters.variants import TAKEN, Variant
from qingtune.config.training import TrainConfig
from qingtune.kernels.device import Hardware
from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.kernels.linear import QuantizedLinear
from qingtune.models.base import load_base
from qingtune.models.load import stored_dtype
from qingtune.output.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_adapted_model(config: TrainConfig, folder: Path, hardware: Hardware) -> PreTrainedModel:
    """The model on its device, quantised and with adapters as the method asks; the trained share is told.

    Adapters train in fp32 on weights in the hardware's dtype. Full training keeps the weights in fp32, as small steps
    would be lost in 16 bits, and computes in the hardware's dtype; only our 8-bit optimizer, which rounds at random so
    that they are not lost on average, works on weights in 16 bits.
    """
    full = config.method == "full"
    bits = config.quantization_bit if config.method == "qlora" else None
    narrow = config.optim in EIGHT_BITS and hardware.device.type == "cpu" and hardware.dtype == torch.bfloat16
    dtype = torch.float32 if full and not narrow else hardware.dtype
    model = load_base(folder, dtype, bits, hardware.device, config.cache_dir)
    if full and dtype == stored_dtype(folder):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # what is loaded as it is stored may lie in the file's pages
    if not full:
        _add_adapters(config, model)
    trained, everything = count_parameters(model)
    say(f"Trainable: {trained:,} of {everything:,} parameters ({trained / everything:.2%}).")
    return model


def _add_adapters(config: TrainConfig, model: PreTrainedModel) -> None:
    """Put adapters on a model, of the kind that the settings name, and let modules_to_save be trained."""
    assert config.lora_alpha is not None
    variant = Variant(
        init_lora_weights=config.init_lora_weights,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        layers_to_transform=config.layers_to_transform,
    )
    if config.init_lora_weights in TAKEN:
        say(f"{config.init_lora_weights}: the adapters' start is taken out of the weights; this may take minutes.")
    whole = find_modules(model, config.modules_to_save)
    adapters = add_lora(
        model, config.lora_target_modules, config.lora_r, config.lora_alpha, config.lora_dropout,
        seed=config.seed, variant=variant, leave=whole,
    )  # fmt: skip
    say(_kind_of_adapters(config, adapters))
    if config.loraplus_lr_ratio:
        say(f"LoRA+: B matrices learn at {config.loraplus_lr_ratio:g} times the learning rate that is shown.")
    for notice in train_in_full(model, whole):
        say(notice)
    if whole:
        say(f"Trained in full, in fp32: {', '.join(whole)}.")


def _kind_of_adapters(config: TrainConfig, adapters: dict[str, LoRALinear]) -> str:
    """A line for the user: kind, rank, scaling, and where."""
    ranks = sorted({adapter.r for adapter in adapters.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    scalings = sorted({f"{adapter.scaling:.4g}" for adapter in adapters.values()})
    scaling = f", scaled by alpha / sqrt(rank) = {' or '.join(scalings)}" if config.use_rslora else ""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    name = "DoRA" if config.use_dora else "LoRA"
    return f"{name}: rank {rank}, alpha {config.lora_alpha:g}{scaling}, on {len(adapters)} layers ({', '.join(kinds)})."


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Trained parameters, and all of them; packed weights count as what they stand for."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, packed + sum(p.numel() for p in model.parameters())
