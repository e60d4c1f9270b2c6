"""LoRA on the experts of a mixture: y = W_e x + s B_e A_e x, for each expert e its own A and B.

Transformers holds such matrices as parameters [E, out, in], which PEFT adapts by `target_parameters`
(peft.tuners.lora.layer.ParamWrapper), without dropout and without DoRA.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from qingtune.adapters.variants import DRAWN, LowRankStack, Variant
from qingtune.kernels.experts.matrices import Stack
from qingtune.kernels.experts.modules import MATRICES, ExpertAdapter, LoRAExperts, QuantizedExperts
from qingtune.models.layers import expert_modules, replace_layer


def new_expert_adapter(
    shape: tuple[int, int, int],
    device: torch.device,
    r: int,
    scaling: float,
    variant: Variant,
    generator: torch.Generator,
) -> ExpertAdapter:
    """An adapter as it starts: A drawn on the CPU for one expert after another, B zero; on meta without numbers.

    shape: experts, out and in features.
    """
    count, out_features, in_features = shape
    if device.type == "meta":
        a = torch.empty(count, r, in_features, device=device)
    else:
        draw = DRAWN[variant.init_lora_weights]
        a = torch.stack([draw(r, in_features, generator) for _ in range(count)]).to(device)
    b = torch.zeros(count, out_features, r, device=device)
    return ExpertAdapter(a, b, scaling, rank_stabilised=variant.use_rslora)


def wrap_experts(model: Any, adapters: dict[str, ExpertAdapter]) -> None:
    """Put adapters on a model's experts, by the matrices' full names."""
    for name, experts in expert_modules(model).items():
        mine = {part: adapters[f"{name}.{part}"] for part in MATRICES if f"{name}.{part}" in adapters}
        if mine:
            replace_layer(model, name, LoRAExperts(experts, mine))


def expert_shapes(model: Any) -> dict[str, tuple[int, int, int]]:
    """The matrices of a model's experts, by full name in its order: experts, out and in features."""
    return {
        f"{name}.{part}": (len(getattr(experts, part)), *Stack(experts, part).shape)
        for name, experts in expert_modules(model).items()
        for part in MATRICES
    }


def expert_adapters(model: Any) -> dict[str, ExpertAdapter]:
    """The adapters of a model's experts by the full names of the matrices they change."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertAdapter)}


def low_rank(adapter: ExpertAdapter) -> LowRankStack:
    """What an adapter does, fp32 on the CPU."""
    a, b = (matrix.detach().float().cpu() for matrix in (adapter.lora_A, adapter.lora_B))
    return LowRankStack(a, b, adapter.scaling)


@torch.no_grad()
def merge_experts(model: Any) -> None:
    """Put every adapter of experts into their weights, in fp32, and take it out; a TypeError if they are quantised."""
    for name, wrapped in [(name, one) for name, one in model.named_modules() if isinstance(one, LoRAExperts)]:
        if isinstance(wrapped.base, QuantizedExperts):
            raise TypeError(f"{name} is quantised")
        for part, adapter in expert_adapters(wrapped).items():
            weight = cast("torch.Tensor", getattr(wrapped.base, part))
            low = low_rank(adapter)
            for number, of_expert in enumerate(weight):
                of_expert.copy_(low.expert(number).merged(of_expert))
        replace_layer(model, name, wrapped.base)
