"""Settings -> adapters on a model, and the dtype of its weights; a run and its plan ask here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from qingtune.adapters.expert_lora import expert_shapes
from qingtune.adapters.full_modules import find_modules, train_in_full
from qingtune.adapters.lora import LoRALinear, add_lora
from qingtune.adapters.variants import TAKEN, Variant
from qingtune.config.training import TrainConfig
from qingtune.kernels.decoder import why_not
from qingtune.kernels.experts.modules import ExpertAdapter
from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.models.as_stored import compute_in_fp32


def weights_dtype(
    config: TrainConfig, device_type: str, dtype: torch.dtype, stored: torch.dtype, on_meta: Callable[[], Any]
) -> torch.dtype:
    """The dtype of the dense weights.

    Adapters train in fp32 on weights in the hardware's dtype; where that is fp32 on a CPU, weights stored in 16 bits
    stay so if the fast kernels read them and nothing is taken out of them. Full training keeps the weights in fp32, as
    small steps would be lost in 16 bits, and computes in the hardware's dtype; only our 8-bit optimizer, which rounds
    at random so that they are not lost on average, works on weights in 16 bits.

    Args:
        dtype: the hardware's.
        stored: that of all weights on disk.
        on_meta: makes the model in that dtype, without weights.
    """
    if config.method == "full":
        narrow = config.optim in EIGHT_BITS and device_type == "cpu" and dtype == torch.bfloat16
        return dtype if narrow else torch.float32
    widened = device_type == "cpu" and dtype == torch.float32 and stored in (torch.bfloat16, torch.float16)
    unchanged = config.method == "lora" and config.init_lora_weights not in TAKEN
    in_modules = (
        config.use_dora and config.lora_dropout
    )  # where each widened weight would be kept for the backward pass
    if not (widened and unchanged and not in_modules):
        return dtype
    model = on_meta()
    rounded = any(buffer.dtype == stored for buffer in model.buffers())  # constants that are computed, not stored
    return stored if why_not(model) is None and not rounded else dtype


def adapt(config: TrainConfig, model: Any, dtype: torch.dtype) -> list[str]:
    """Add the adapters to a model whose weights have the dtype of `weights_dtype`; dtype: the hardware's.

    Returns:
        lines for the user.

    Raises:
        UserError: as add_adapters.
    """
    if dtype == torch.float32 != model.get_input_embeddings().weight.dtype:
        compute_in_fp32(model)
    return add_adapters(config, model)


def add_adapters(config: TrainConfig, model: Any) -> list[str]:
    """Put adapters of the kind that the settings name on a model, and let modules_to_save be trained.

    Returns:
        lines for the user: what was added, and what follows from it.

    Raises:
        UserError: a setting names what the model does not have, or what cannot be trained.
    """
    assert config.lora_alpha is not None
    variant = Variant(
        init_lora_weights=config.init_lora_weights,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        layers_to_transform=config.layers_to_transform,
    )
    whole, experts = find_modules(model, config.modules_to_save), expert_shapes(model)
    adapters = add_lora(
        model, config.lora_target_modules, config.lora_r, config.lora_alpha, config.lora_dropout,
        seed=config.seed, variant=variant, leave=whole,
    )  # fmt: skip
    lines = [_kind_of_adapters(config, adapters), *_of_experts(config, variant, experts, adapters)]
    if config.loraplus_lr_ratio:
        lines.append(f"LoRA+: B matrices use {config.loraplus_lr_ratio:g} times the learning rate shown.")
    lines += train_in_full(model, whole)
    if whole:
        lines.append(f"Trained in full, in fp32: {', '.join(whole)}.")
    return lines


def _of_experts(
    config: TrainConfig, variant: Variant, experts: Collection[str], adapters: Collection[str]
) -> list[str]:
    """Lines for the user: what is different for a mixture's experts. Both are full names."""
    if experts and config.lora_target_modules is None and not variant.reaches_experts:
        return ["The experts have no adapters: for these there is neither DoRA nor a start by their weights."]
    if set(experts) & set(adapters) and config.lora_dropout:
        return ["lora_dropout does not act on the experts' adapters, as in PEFT."]
    return []


def _kind_of_adapters(config: TrainConfig, adapters: dict[str, LoRALinear | ExpertAdapter]) -> str:
    """A line for the user: kind, rank, scaling, and where."""
    ranks = sorted({adapter.r for adapter in adapters.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    scalings = sorted({f"{adapter.scaling:.4g}" for adapter in adapters.values()})
    scaling = f", scaled by alpha / sqrt(rank) = {' or '.join(scalings)}" if config.use_rslora else ""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    name = "DoRA" if config.use_dora else "LoRA"
    return f"{name}: rank {rank}, alpha {config.lora_alpha:g}{scaling}, on {len(adapters)} layers ({', '.join(kinds)})."
