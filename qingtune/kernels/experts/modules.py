"""Modules of a mixture's experts other than Transformers': held in 4 or 8 bits, and with adapters. The fast kernels
look into them (matrices.py); called as Transformers calls its own, they compute an expert at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from qingtune.kernels.linear import QuantizedLinear

MATRICES = ("gate_up_proj", "down_proj")  # of a module of experts, in PEFT's order too

# The name of a matrix, the number of an expert, its rows [n, in] -> [n, out].
Product = Callable[[str, int, torch.Tensor], torch.Tensor]


def expert_product(experts: Any, name: str, number: int, x: torch.Tensor) -> torch.Tensor:
    """x [n, in] times a matrix of an expert, in x's dtype; experts: a module with parameters, or `QuantizedExperts`."""
    weights = getattr(experts, name)
    return weights[number](x) if isinstance(weights, nn.ModuleList) else F.linear(x, weights[number].to(x.dtype))


def run_experts(
    x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, activation: nn.Module, product: Product
) -> torch.Tensor:
    """What Transformers' modules of experts compute, an expert at a time.

    Args:
        x: [T, D].
        chosen: numbers of experts, [T, k].
        shares: of the chosen ones, [T, k].
        activation: of the gate.
        product: with an expert's matrices.

    Returns:
        [T, D].
    """
    out = torch.zeros_like(x)
    for number in chosen.unique().tolist():
        tokens, places = torch.where(chosen == number)
        gate, up = product("gate_up_proj", number, x[tokens]).chunk(2, -1)
        rows = product("down_proj", number, activation(gate) * up)
        out = out.index_add(0, tokens, (rows * shares[tokens, places, None]).to(out.dtype))
    return out


class FrozenExperts(nn.Module):
    """Experts that are computed one by one, however their matrices are held; act_fn: of the gate."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.act_fn = act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As Transformers calls it: [T, D], [T, k], [T, k] -> [T, D]."""

        def product(name: str, number: int, x: torch.Tensor) -> torch.Tensor:
            return expert_product(self, name, number, x)

        return run_experts(hidden_states, top_k_index, top_k_weights, self.act_fn, product)


class QuantizedExperts(FrozenExperts):
    """Frozen experts, each matrix a layer in 4 or 8 bits.

    Args:
        act_fn: of the gate.
        gate_up_proj: of each expert, [2 I, D].
        down_proj: of each expert, [D, I].
    """

    def __init__(
        self, act_fn: nn.Module, gate_up_proj: list[QuantizedLinear], down_proj: list[QuantizedLinear]
    ) -> None:
        super().__init__(act_fn)
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up_proj), nn.ModuleList(down_proj)


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


class LoRAExperts(nn.Module):
    """A mixture's frozen experts with adapters.

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
        """As Transformers calls it: [T, D], [T, k], [T, k] -> [T, D]."""

        def product(name: str, number: int, x: torch.Tensor) -> torch.Tensor:
            out = expert_product(self.base, name, number, x)
            adapter = cast("ExpertAdapter | None", getattr(self, name))
            return out if adapter is None else out + adapter.addition(number, x)

        activation = cast("nn.Module", self.base.act_fn)
        return run_experts(hidden_states, top_k_index, top_k_weights, activation, product)
