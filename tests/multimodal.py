"""Tiny multimodal checkpoints as Transformers saves them, and what their text answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import lively

from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.load import load_decoder
from qingtune.kernels.device import Hardware

FP32 = Hardware(torch.device("cpu"), torch.float32, "")
IDS = [5, 17, 200, 3, 42, 42, 99, 310, 7, 11, 250]
TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32
}  # fmt: skip
SEES = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
SIGLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = {name: value for name, value in TEXT.items() if name != "head_dim"}
PIXTRAL = {"model_type": "pixtral", **SIGLIP, "image_size": 16, "patch_size": 4, "head_dim": 8}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
# The class, its configuration's, and what the latter is made of.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {"text_config": TEXT | DELTA, "vision_config": {**SEES, "num_position_embeddings": 16, "patch_size": 4}},
    ),
    "qwen3.5 moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {
            "text_config": TEXT | DELTA | EXPERTS,
            "vision_config": {**SEES, "num_position_embeddings": 16, "patch_size": 4},
        },
    ),
    "gemma 3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": TEXT
            | {"sliding_window": 4, "query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**SIGLIP, "image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral small": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "vision_config": PIXTRAL},
    ),
    "ministral": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "ministral3", "rope_parameters": YARN}, "vision_config": PIXTRAL},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": PLAIN | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {**SEES, "fullatt_block_indexes": [0], "patch_size": 4},
        },
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": PLAIN | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        },
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": TEXT
            | {"rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}},
            "vision_config": {**SEES, "num_position_embeddings": 16, "patch_size": 4, "deepstack_visual_indexes": [0]},
        },
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": TEXT | {"model_type": "qwen3"},
            "vision_config": {**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", **SIGLIP, "image_size": 16, "patch_size": 4},
        },
    ),
    "gemma 4": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": TEXT
            | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0},
            "vision_config": SIGLIP,
            "audio_config": None,
        },
    ),
}
GENERAL = ("gemma 4",)  # whose text has no fast kernels


def made(kind: str, folder: Path, *, tied: bool = True) -> Any:
    """A lively multimodal model, saved with a tokenizer."""
    name, config, settings = KINDS[kind]
    torch.manual_seed(0)
    made_of = getattr(transformers, config)(**settings, tie_word_embeddings=tied)
    model = lively(getattr(transformers, name)(made_of))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def opened(kind: str, folder: Path) -> Any:
    """A folder opened by Transformers' multimodal class, which must find all it is made of there."""
    model, found = getattr(transformers, KINDS[kind][0]).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


@torch.inference_mode()
def logits_of(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def answered(kind: str, folder: Path, adapter: Path | None = None) -> torch.Tensor:
    decoder = load_decoder(folder, adapter, None, FP32, None, 1)
    assert isinstance(decoder, CachedDecoder) == (kind not in GENERAL)
    return decoder.start(IDS)


def under_other_names(folder: Path) -> Path:
    """The same checkpoint with names as newer ones have, or as older ones had."""
    path = folder / "model.safetensors"
    swapped = {
        ("model." + name.replace("language_model.model.", "language_model."))
        if name.startswith("language_model.model.")
        else name.replace("model.language_model.", "language_model.model.")
        if name.startswith("model.language_model.")
        else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(swapped, path, metadata={"format": "pt"})
    return folder
