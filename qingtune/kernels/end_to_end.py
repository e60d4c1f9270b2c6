"""How a model's own modules compute the loss of a micro-batch: its samples end to end or one by one, and with its head
as a plain product or as its own forward applies it.

Positions that begin at 0 with every sample tell Transformers' masks where one ends (masking_utils, packed sequences).
Not every architecture builds its masks there, or mixes tokens by attention alone, and some scale or cap their logits.
So the model is asked: two tiny samples are computed together and one by one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Kinds of layers in which a mask keeps samples apart; others carry a state from one token to the next.
_MASKED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_SAMPLE_LENGTHS = (6, 5)
_HEAD_FACTOR = 1000.0  # on logits: a cap shows only where they are large


@dataclass(frozen=True)
class Ways:
    """How losses are computed by the model's modules.

    Attributes:
        one_by_one: the reason why samples of a micro-batch are computed one by one; None if they lie end to end.
        plain_head: whether logits are the head's weight times the hidden states and nothing else.
    """

    one_by_one: str | None
    plain_head: bool


def why_samples_would_mix(config: Any) -> str | None:
    """The reason, by the configuration alone, why a sample would give other results when concatenated with others."""
    kinds: set[str] = set(config.to_dict().get("layer_types") or ["full_attention"])
    if others := kinds - _MASKED_LAYERS:
        return f"this model has layers that are not attention ({', '.join(sorted(others))})"
    rotary = config.to_dict().get("rope_parameters") or {}
    for parameters in [rotary] if "rope_type" in rotary else rotary.values():
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            return f'its rotary embedding ("{parameters["rope_type"]}") changes with the longest sample'
    return None


def changes_logits(config: Any) -> bool:
    """Whether the model scales or caps its head's logits, as far as its configuration says."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in names)


@torch.no_grad()
def try_ways(model: Any, tolerance: float) -> Ways:
    """Compute two tiny samples together and one by one, and look at what the model does with its head's output.

    Args:
        tolerance: largest relative error of a token's logits that counts as rounding.
    """
    training = model.training
    model.eval()
    try:
        samples = _samples(model)
        plain_head, reason = _has_plain_head(model, samples[0]), _why_one_by_one(model, samples, tolerance)
        if not plain_head:  # all logits of a pass would be held at once
            reason = reason or "its logits are more than a product with its head"
        return Ways(reason, plain_head)
    finally:
        model.train(training)


def _samples(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary, device = model.get_input_embeddings().num_embeddings, model.get_input_embeddings().weight.device
    return [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in _SAMPLE_LENGTHS]


def _why_one_by_one(model: Any, samples: list[torch.Tensor], tolerance: float) -> str | None:
    if reason := why_samples_would_mix(model.config):
        return reason
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no positions"
    positions = torch.cat([torch.arange(len(ids), device=ids.device) for ids in samples])
    try:
        together = model(input_ids=torch.cat(samples)[None], position_ids=positions[None], use_cache=False).logits[0]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"concatenated samples failed ({error})"
    apart = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])
    error = ((together - apart).float().norm(dim=1) / apart.float().norm(dim=1)).max()
    # NaN would not be larger than anything.
    return None if error <= tolerance else f"concatenated samples change each other's logits, by {float(error):.0%}"


def _has_plain_head(model: Any, ids: torch.Tensor) -> bool:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or len(list(head.parameters())) > 1:  # with a bias
        return False
    seen: list[torch.Tensor] = []

    def enlarge(_head: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        seen.extend((inputs[0], logits * _HEAD_FACTOR))
        return seen[-1]

    handle = head.register_forward_hook(enlarge)
    try:
        given = model(input_ids=ids[None], use_cache=False).logits
    finally:
        handle.remove()
    hidden = model.base_model(input_ids=ids[None], use_cache=False)[0]
    return torch.equal(given, seen[1].to(given.dtype)) and torch.allclose(hidden.to(seen[0].dtype), seen[0])
