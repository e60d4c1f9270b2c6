"""The LoRA layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + s B A dropout(x); and DoRA's.

What else sets kinds of adapters apart is in variants.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.expert_lora import (
    expert_shapes,
    merge_experts,
    new_expert_adapter,
    wrap_experts,
)
from qingtune.adapters.names import choose_layers, is_within, match_names, pattern_value
from qingtune.adapters.variants import DRAWN, TAKEN, LowRank, Pair, Variant, merge_weight, row_norms, scaling_of, take
from qingtune.errors import UserError
from qingtune.kernels.decoder import why_not
from qingtune.kernels.dropout import dropout
from qingtune.kernels.experts.modules import ExpertAdapter
from qingtune.kernels.linear import QuantizedLinear
from qingtune.kernels.projection import Adapter, Member
from qingtune.models.layers import dense_weight, device_of, linear_layers, replace_layer


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank addition.

    Args:
        base: the layer.
        a: [r, in], as A starts.
        b: [out, r], as B starts.
        scaling: s, the factor on their product.
        dropout_probability: on A's input.

    Attributes:
        lora_A: fp32 [r, in].
        lora_B: fp32 [out, r].
        lora_magnitude_vector: of DoRALinear; None here.
        taken: A and B as they were taken out of the base's weight, fp32 on the CPU; None if it is as it was loaded.
        rank_stabilised: whether s is alpha / sqrt(r); for the files.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self, base: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout_probability: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base
        self.r, self.scaling = len(a), scaling
        device = device_of(base)
        # Contiguous, as optimizers take a parameter and its states, which checkpoints bring back so, as flat memory.
        self.lora_A = nn.Parameter(a.float().to(device).contiguous())
        self.lora_B = nn.Parameter(b.float().to(device).contiguous())
        self.register_parameter("lora_magnitude_vector", None)
        self.dropout_probability = dropout_probability
        self.taken: Pair | None = None
        self.rank_stabilised = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]; the adapter is computed in x's dtype, its gradients are fp32."""
        return self.base(x) + self._addition(self._dropped(x))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.dropout_probability) if self.training else x

    def _addition(self, x: torch.Tensor) -> torch.Tensor:
        """s B A x."""
        low = x @ self.lora_A.to(x.dtype).t()
        return (low @ self.lora_B.to(x.dtype).t()) * self.scaling

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's weight [out, in], as the layer holds it, with the adapter's change, fp32."""
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector).merged(weight)

    def low_rank(self) -> LowRank:
        """The adapter as an addition to the weight as it was loaded, fp32 on the CPU; of twice the rank if taken."""
        a, b = (matrix.detach().float().cpu() for matrix in (self.lora_A, self.lora_B))
        if self.taken:
            a, b = torch.cat([a, self.taken[0]]), torch.cat([b, -self.taken[1]], 1)
        magnitude = self.lora_magnitude_vector
        return LowRank(a, b, self.scaling, None if magnitude is None else magnitude.detach().float().cpu())


class DoRALinear(LoRALinear):
    """DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5): y = m (W + s B A) x / |W + s B A|.

    The norms of the rows follow training but get no gradient (section 4.3). Dropout acts on the base's part too where
    it is scaled again, as in PEFT: y = W x + (m / |..| - 1) W dropout(x) + m / |..| s B A dropout(x).

    Attributes:
        lora_magnitude_vector: m, fp32 [out]; the norms themselves at the start, so that training begins at the base.
    """

    def __init__(
        self,
        base: nn.Module,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout_probability: float = 0.0,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        super().__init__(base, a, b, scaling, dropout_probability)
        start = self._norms() if magnitude is None else magnitude.float().to(self.lora_A.device)
        self.lora_magnitude_vector = nn.Parameter(start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]; the norms are computed in fp32."""
        dropping = self.training and self.dropout_probability > 0
        factor = cast("nn.Parameter", self.lora_magnitude_vector) / self._norms()
        out = self.base(x)
        dropped = self._dropped(x)
        plain = self.base(dropped) if dropping else out
        bias = cast("torch.Tensor | None", self.base.bias)
        plain = plain if bias is None else plain - bias.to(plain.dtype)
        return out + (factor - 1).to(out.dtype) * plain + factor.to(out.dtype) * self._addition(dropped)

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """|W + s B A|, fp32 [out]; without numbers on the meta device."""
        if self.lora_A.is_meta:
            return torch.empty(len(self.lora_B), device="meta")
        base = self.base
        with torch.autocast(self.lora_A.device.type, enabled=False):
            quantized = isinstance(base, QuantizedLinear)
            weight = base.dequantize(torch.float32) if quantized else dense_weight(base).detach()
            return row_norms(merge_weight(weight, self.lora_A, self.lora_B, self.scaling))


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Out and in features."""
    quantized = isinstance(layer, QuantizedLinear)
    return (layer.out_features, layer.in_features) if quantized else tuple(dense_weight(layer).shape)


def add_lora(
    model: Any,
    names: Sequence[str] | None,
    r: int,
    alpha: float,
    dropout: float,
    *,
    seed: int = 0,
    variant: Variant | None = None,
    leave: Sequence[str] = (),
) -> dict[str, LoRALinear | ExpertAdapter]:
    """Freeze the model and wrap its layers; returns the adapters by the full names of layers and experts' matrices.

    Dropout does not act on the adapters of experts, as in PEFT.

    Args:
        names: last parts (q_proj) or longer ends (layers.0.self_attn.q_proj) of the layers' names; None for all.
        r: rank, where the variant has no other.
        alpha: the scaling's numerator, likewise.
        variant: how the adapters differ from plain LoRA. Those that do not exist for experts leave these alone.
        leave: full names of modules in which no layer is adapted, as they are trained in full.

    Raises:
        UserError: a name matches no layer, or the variant does not fit a layer.
    """
    variant = variant or Variant()
    layers, experts = linear_layers(model), expert_shapes(model)
    reached = match_names([*layers, *experts], names)
    if not variant.reaches_experts:
        if names is not None and (refused := [name for name in reached if name in experts]):
            raise UserError(
                f"{refused[0]} holds a mixture's experts, for which there is neither DoRA nor a start by their weights",
                where="lora_target_modules",
                fix="Name layers that are no experts, or remove use_dora and init_lora_weights.",
            )
        reached = [name for name in reached if name not in experts]
    matched = [name for name in reached if not any(is_within(name, module) for module in leave)]
    if not matched:
        raise UserError("no layer is left for adapters: modules_to_save contains them all")
    patterns = {"rank_pattern": variant.rank_pattern, "alpha_pattern": variant.alpha_pattern}
    chosen = choose_layers(matched, variant.layers_to_transform, patterns)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, LoRALinear | ExpertAdapter] = {}
    for name in chosen:
        rank = int(pattern_value(variant.rank_pattern, name, r))
        numerator = pattern_value(variant.alpha_pattern, name, alpha)
        scaling = scaling_of(numerator, rank, rank_stabilised=variant.use_rslora)
        if name in experts:
            device = device_of(model.get_submodule(name.rpartition(".")[0]))
            adapters[name] = new_expert_adapter(experts[name], device, rank, scaling, variant, generator)
            continue
        adapters[name] = one = _adapter(name, layers[name], rank, scaling, dropout, variant, generator)
        replace_layer(model, name, one)
    wrap_experts(model, {name: one for name, one in adapters.items() if isinstance(one, ExpertAdapter)})
    return adapters


def _adapter(
    name: str, layer: nn.Module, r: int, scaling: float, dropout: float, variant: Variant, generator: torch.Generator
) -> LoRALinear:
    """A new adapter, around its layer; what it starts with is taken out of the layer if its start is such."""
    start, taken = variant.init_lora_weights, None
    out_features, in_features = shape_of(layer)
    if start in TAKEN and isinstance(layer, QuantizedLinear):
        raise TypeError(f"{name} is quantised")  # refused when settings are checked
    if (device := device_of(layer)).type == "meta":  # no numbers
        a, b = torch.empty(r, in_features, device=device), torch.empty(out_features, r, device=device)
        taken = (a, b) if start in TAKEN else None
    elif start in TAKEN:
        a, b = take(start, dense_weight(layer).detach(), r, scaling, name)
        _take_out(layer, (a, b), scaling)
        taken = a.cpu().clone(), b.cpu().clone()
    else:  # drawn on the CPU, so that every device starts alike; B is zero, so that training begins at the base model
        a, b = DRAWN[start](r, in_features, generator), torch.zeros(out_features, r)
    adapter = (DoRALinear if variant.use_dora else LoRALinear)(layer, a, b, scaling, dropout)
    adapter.taken, adapter.rank_stabilised = taken, variant.use_rslora
    return adapter


def _take_out(layer: Any, pair: Pair, scaling: float) -> None:
    """W becomes W - s B A, computed in fp32 and rounded once to the weight's dtype."""
    rest = merge_weight(dense_weight(layer).detach(), *pair, -scaling)
    rest = rest.t() if isinstance(layer, Conv1D) else rest
    layer.weight.data = rest.contiguous().to(layer.weight.dtype)  # what was loaded may lie in the file's pages


def lora_layers(model: Any) -> dict[str, LoRALinear]:
    """The adapters of a model by the names of the layers they wrap."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Put every adapter into its layer's weight, in fp32, and take it out; a TypeError if a layer is quantised."""
    merge_experts(model)
    for name, adapter in lora_layers(model).items():
        base = adapter.base
        if isinstance(base, QuantizedLinear):
            raise TypeError(f"{name} is quantised")
        weight = cast("torch.Tensor", base.weight)
        merged = adapter.merged(dense_weight(base))
        weight.copy_((merged.t() if isinstance(base, Conv1D) else merged).to(weight.dtype))
        replace_layer(model, name, base)


def why_general(model: Any, device_type: str) -> str | None:
    """The reason why a run on "cpu", "cuda" or "mps" needs the model's own modules; None if it does not."""
    if reason := why_not(model):
        return reason
    if any(isinstance(layer, DoRALinear) and layer.dropout_probability for layer in lora_layers(model).values()):
        return "DoRA with lora_dropout needs a second product with each weight, which the fast kernels do not do"
    return None if device_type in ("cpu", "cuda") else f"the fast ones were not tested on {device_type}"


def member(layer: nn.Module) -> Member:
    """A linear layer, wrapped or not, as the decoder's projections take it."""
    if not isinstance(layer, LoRALinear):
        return Member(layer, None)
    return Member(layer.base, Adapter(layer.lora_A, layer.lora_B, layer.scaling, layer.lora_magnitude_vector))
