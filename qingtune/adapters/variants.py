"""What sets one kind of adapter apart from another: how its matrices start, how they are scaled, how they are merged.

Each kind is a small function; the layer (lora.py) and the files (files.py) are made of them.

Shapes: W [out, in], A [r, in], B [out, r], the addition s B A with the scaling s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from qingtune.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]

# --- Scaling ---------------------------------------------------------------------------------------------------------


def scaling_of(alpha: float, r: int, *, rank_stabilised: bool) -> float:
    """alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685), or rank-stabilised alpha / sqrt(r).

    With the latter, activations and gradients keep their size as the rank grows (rsLoRA, Kalajdzievski 2023,
    https://arxiv.org/abs/2312.03732, theorem 3.2).
    """
    return alpha / (math.sqrt(r) if rank_stabilised else r)


# --- Starts ----------------------------------------------------------------------------------------------------------


def _pissa(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 and 3): the largest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return _principal(left[:, :r], values[:r], right[:r], scaling)


def _fast_pissa(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """PiSSA with 16 subspace iterations of a random projection in the place of the whole decomposition."""
    with torch.random.fork_rng():  # the same start each time, so that a resumed run has the same base
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(weight, r, niter=16)
    return _principal(left, values, right.t(), scaling)


def _principal(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, scaling: float) -> Pair:
    root = (values / scaling).sqrt()
    return root[:, None] * right, left * root


def _olora(weight: torch.Tensor, r: int, _scaling: float) -> Pair:
    """OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775): the first rows of R and columns of Q of W = Q R."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


# Ways to draw A [r, in] that leave the base alone, B being zero, as nn.Linear starts and as PEFT's gaussian:
# (r, in features, generator) -> A.
DRAWN: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "default": lambda r, n, draw: nn.init.kaiming_uniform_(torch.empty(r, n), math.sqrt(5), generator=draw),
    "gaussian": lambda r, n, draw: nn.init.normal_(torch.empty(r, n), std=1 / r, generator=draw),
}
# Ways that take s B A out of the base's weight, W fp32: (W, r, scaling) -> A, B. Signs of singular vectors and of Q's
# columns are arbitrary, but s B A is not, so the rest of the weight can be found again.
TAKEN: dict[str, Callable[[torch.Tensor, int, float], Pair]] = {
    "pissa": _pissa,
    "pissa_niter_16": _fast_pissa,
    "olora": _olora,
}


def take(start: str, weight: torch.Tensor, r: int, scaling: float, name: str) -> Pair:
    """The A and B that a start takes out of a weight, fp32 on its device; a UserError if it has too few directions."""
    if r > min(weight.shape):
        raise UserError(
            f"init_lora_weights {start} allows a rank of at most {min(weight.shape)} for {name}, not {r}",
            fix="Choose a smaller lora_r, or set a smaller rank for this layer in rank_pattern.",
        )
    return TAKEN[start](weight.float(), r, scaling)


# --- Merging ---------------------------------------------------------------------------------------------------------


def merge_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s B A, fp32 on W's device."""
    wide = weight.float()
    return torch.addmm(wide, b.to(wide), a.to(wide), alpha=scaling)


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row, [out]: DoRA's magnitude of each output."""
    return torch.linalg.vector_norm(weight, dim=1)


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to one weight.

    Attributes:
        a: fp32 [r, in].
        b: fp32 [out, r].
        scaling: of their product.
        magnitude: DoRA's norm of each row of the merged weight, fp32 [out]; None for plain LoRA.
        start: of TAKEN if a and b began as a part of the base's weight, which is to be taken out of it first.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    start: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes, [out, in]."""
        return len(self.b), self.a.shape[1]

    def on_unchanged_base(self, weight: torch.Tensor, name: str = "the layer") -> LowRank:
        """The same as an addition to the base's weight [out, in] as it is, of twice the rank where there is a start.

        W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
        """
        if self.start is None:
            return self
        a0, b0 = take(self.start, weight, len(self.a), self.scaling, name)
        return replace(self, a=torch.cat([self.a.to(a0), a0]), b=torch.cat([self.b.to(b0), -b0], 1), start=None)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's weight [out, in] with the adapter's change, fp32."""
        plain = self.on_unchanged_base(weight)
        merged = merge_weight(weight, plain.a, plain.b, plain.scaling)
        if plain.magnitude is None:
            return merged
        return merged * (plain.magnitude.to(merged) / row_norms(merged))[:, None]

    def product(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] times the base's weight [out, in] plus the change, computed separately as in training: [T, out]."""
        plain = self.on_unchanged_base(weight)
        low = x @ plain.a.to(x).t()
        product = torch.addmm(x @ weight.t(), low, plain.b.to(x).t(), alpha=plain.scaling)
        if plain.magnitude is None:
            return product
        norms = row_norms(merge_weight(weight, plain.a, plain.b, plain.scaling))
        return product * (plain.magnitude.to(norms) / norms).to(product.dtype)


@dataclass(frozen=True)
class LowRankStack:
    """What an adapter does to one matrix of each expert of a mixture, a parameter [E, out, in].

    Attributes:
        a: fp32 [E, r, in].
        b: fp32 [E, out, r].
        scaling: of their products.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it changes."""
        return (*self.b.shape[:2], self.a.shape[2])

    def expert(self, number: int) -> LowRank:
        """What it does to one expert's weight."""
        return LowRank(self.a[number], self.b[number], self.scaling)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's weights [E, out, in] with the adapter's change, fp32."""
        return torch.stack([self.expert(number).merged(part) for number, part in enumerate(weight)])


# --- Which layer gets what -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How a model's adapters differ from plain LoRA; the fields mean what settings of these names mean."""

    init_lora_weights: str = "default"
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    layers_to_transform: Sequence[int] | None = None

    @property
    def reaches_experts(self) -> bool:
        """Whether a mixture's experts, which PEFT adapts as parameters, can have adapters of this kind."""
        return not self.use_dora and self.init_lora_weights in DRAWN
