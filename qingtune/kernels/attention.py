"""Causal attention over samples laid end to end: each sample sees itself alone, and no mask is ever built.

Registered with Transformers as an attention implementation; the model's forward gets `sample_starts` as a keyword,
which reaches the function here. Without that keyword (generation) it is Transformers' own SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

NAME = "qingtune_end_to_end"

# Architectures checked (tests/invariant) to give, laid end to end, what they give one by one.
CHECKED_MODEL_TYPES = frozenset({"qwen2", "qwen3", "llama", "gpt2"})


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sample_starts: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sample; the interface is that of Transformers.

    Args:
        query: [1, heads, T, head_dim].
        key: [1, key-value heads, T, head_dim]; likewise value.
        attention_mask: None for samples laid end to end.
        dropout: probability on attention weights.
        scaling: factor on the scores; 1 / sqrt(head_dim) by default.
        sample_starts: where each sample starts, and T at the end.

    Returns:
        [1, T, heads, head_dim], and None for the weights, which are not kept.
    """
    if sample_starts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(sample_starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def why_samples_would_mix(config: Any) -> str | None:
    """The reason why a sample would give other results when concatenated with others; None if it would not."""
    kinds = set(config.to_dict().get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"this model has layers of other kinds than full attention ({', '.join(sorted(kinds))})"
    kind = (config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f'its rotary embedding ("{kind}") changes with the longest sample'
    return None


def why_one_by_one(config: Any) -> str | None:
    """The reason why a model of this configuration must get its samples one by one; None if they may lie end to end."""
    if config.model_type not in CHECKED_MODEL_TYPES:
        return f'concatenated samples are not verified for "{config.model_type}" models'
    return why_samples_would_mix(config)


def use_end_to_end(model: Any) -> str | None:
    """Switch a model to this attention; returns None, or the reason why its samples must go one by one instead."""
    if reason := why_one_by_one(model.config):
        return reason
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    model.set_attn_implementation(NAME)
    return None
