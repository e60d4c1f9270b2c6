"""Tiny models with mixtures of experts, of Transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention"],
}
OTHERS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Olmoe": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "Qwen3Moe": {},
    "Qwen3Next": DELTA | {"decoder_sparse_step": 1},
    "Qwen3_5MoeText": DELTA,
}


def make_mixture(kind: str = "Qwen3Moe", *, seed: int = 0, **changes: Any) -> Any:
    """A random model of two layers; kind: the beginning of its configuration's class."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | OTHERS[kind] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # experts and routers else start at values too small to see
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model
