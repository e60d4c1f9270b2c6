"""LoRA on the experts of a mixture: y = W_e x + s B_e A_e x, for each expert e its own A and B.

Transformers holds such matrices as parameters [E, out, in], which PEFT adapts by `target_parameters`
(peft.tuners.lora.layer.ParamWrapper), without dropout and without DoRA.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qingtune.adapters.variants import DRAWN, LowRankStack, Variant
from qingtune.kernels.expert_matrices import Stack
from qingtune.kernels.expert_modules import MATRICES, QuantizedExperts, expert_product, run_experts
from qingtune.kernels.projection import Adapter
from qingtune.models.layers import expert_modules, replace_layer


class ExpertAdapter(nn.Module):
    """The trained low-rank addition to one matrix of each expert.

    Args:
        a: [E, r, in], as A starts.
        b: [E, out, r], as B starts.
        scaling: s, the factor on their product.
        rank_stabilised: whether s is alpha / sqrt(r); for the files.

    Attributes:
        lora_A: fp32 [E, r, in].
        lora_B: fp32 [E, out, r].
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float, *, rank_stabilised: bool = False) -> None:
        super().__init__()
        self.r, self.scaling, self.rank_stabilised = a.shape[1], scaling, rank_stabilised
        self.lora_A, self.lora_B = nn.Parameter(a.float().contiguous()), nn.Parameter(b.float().contiguous())

    def addition(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """s B_e A_e x; x: [n, in] -> [n, out], in x's dtype."""
        low = x @ self.lora_A[number].to(x.dtype).t()
        return (low @ self.lora_B[number].to(x.dtype).t()) * self.scaling

    def low_rank(self) -> LowRankStack:
        """The adapter, fp32 on the CPU."""
        a, b = (matrix.detach().float().cpu() for matrix in (self.lora_A, self.lora_B))
        return LowRankStack(a, b, self.scaling)


class LoRAExperts(nn.Module):
    """A mixture's frozen experts with adapters, called as Transformers calls them.

    Args:
        base: Transformers' module, or `QuantizedExperts`.
        adapters: by the names of the matrices they change, one or both of MATRICES.
    """

    gate_up_proj: ExpertAdapter | None
    down_proj: ExpertAdapter | None

    def __init__(self, base: nn.Module, adapters: dict[str, ExpertAdapter]) -> None:
        super().__init__()
        self.base = base
        for name in MATRICES:
            self.register_module(name, adapters.get(name))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, D], experts [T, k] and their shares [T, k] -> [T, D]."""

        def product(name: str, number: int, x: torch.Tensor) -> torch.Tensor:
            out = expert_product(self.base, name, number, x)
            adapter = cast("ExpertAdapter | None", getattr(self, name))
            return out if adapter is None else out + adapter.addition(number, x)

        return run_experts(hidden_states, top_k_index, top_k_weights, cast("nn.Module", self.base.act_fn), product)


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


def stacks(experts: Any) -> tuple[Stack, Stack]:
    """A mixture's experts, wrapped or not, as the decoder's blocks take them: gate and up, down."""
    if not isinstance(experts, LoRAExperts):
        return Stack(experts, MATRICES[0]), Stack(experts, MATRICES[1])
    found = [
        Stack(experts.base, name, adapter and Adapter(adapter.lora_A, adapter.lora_B, adapter.scaling))
        for name, adapter in zip(MATRICES, (experts.gate_up_proj, experts.down_proj), strict=True)
    ]
    return found[0], found[1]


@torch.no_grad()
def merge_experts(model: Any) -> None:
    """Put every adapter of experts into their weights, in fp32, and take it out; a TypeError if they are quantised."""
    for name, wrapped in [(name, one) for name, one in model.named_modules() if isinstance(one, LoRAExperts)]:
        if isinstance(wrapped.base, QuantizedExperts):
            raise TypeError(f"{name} is quantised")
        for part, adapter in expert_adapters(wrapped).items():
            weight = cast("torch.Tensor", getattr(wrapped.base, part))
            for number, one in enumerate(adapter.low_rank().experts()):
                weight[number].copy_(one.merged(weight[number]))
        replace_layer(model, name, wrapped.base)
