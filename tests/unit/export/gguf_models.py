"""Tiny models of the architectures that are exported, and what llama.cpp makes of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from tiny_runs import lively

from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "head_dim": 64, "num_hidden_layers": 4,
}  # fmt: skip
GEMMA = {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}
GEMMA2 = {
    **GEMMA, "num_hidden_layers": 3, "tie_word_embeddings": True, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 7.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 2.0, 3.0],
    "long_factor": [1.0, 4.0, 9.0, 9.5],
}
# By a name of their own: the class of the configuration, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, another factor of yarn": (
        "Qwen2Config", {"rope_parameters": {**YARN, "attention_factor": 1.5}, "tie_word_embeddings": True}
    ),
    "mistral": ("MistralConfig", {**HEADS, "sliding_window": None}),
    "ministral": (
        "MinistralConfig", {**HEADS, "sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "ministral3": ("Ministral3Config", {**HEADS, "rope_parameters": YARN}),
    "ministral3, other settings of yarn": (
        "Ministral3Config", {"head_dim": 32, "rope_parameters": YARN | {"mscale_all_dim": 0.7, "beta_fast": 8.0}}
    ),
    "ministral3 without yarn": (
        "Ministral3Config", {**HEADS, "rope_parameters": YARN | {"rope_type": "default"}}
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADS, **EXPERTS}),
    "phi3": ("Phi3Config", {}),
    "phi3 tied, partial rotary": (
        "Phi3Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3 longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "phi3 longrope, a long text": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "gemma2": ("Gemma2Config", GEMMA2),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gemma3 linear": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "qwen3_5 tied, as many values as keys": (
        "Qwen3_5TextConfig",
        {**LINEAR, "linear_num_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 48}),
}  # fmt: skip
IDS = list(range(3, 60))


def save(folder: Path, name: str, **changes: Any) -> Any:
    """Save a lively model of MODELS and its tokenizer."""
    config, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES | settings | changes))
    lively(model).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def export_f32(folder: Path, output: Path) -> Path:
    export(ExportConfig(base_model=str(folder), output_dir=str(output), quantize=["f32"]))
    return output / f"{output.name}-f32.gguf"


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def assert_llama_cpp_answers(path: Path, model: Any, *, gemma: bool = False) -> None:
    """llama.cpp gives the model's logits from the file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    theirs.eval(IDS)
    wanted = logits_of(model)
    found = theirs.scores[: len(IDS)]
    # ggml takes GELU from a table in fp16.
    assert np.abs(found - wanted).max() < (0.02 if gemma else 1e-3) * wanted.std()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= (0.95 if gemma else 1)
