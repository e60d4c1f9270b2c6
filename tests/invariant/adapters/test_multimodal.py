"""The text of a multimodal checkpoint: answered, adapted and merged under the checkpoint's own names, and the rest of
the checkpoint left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, lively, train

from qingtune.adapters.peft_files import load_adapter
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.load import load_decoder
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig
from qingtune.kernels.device import Hardware
from qingtune.models.load import load_model

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
            "text_config": TEXT | {"sliding_window": 4},
            "vision_config": {**SIGLIP, "image_size": 16, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
    ),
}


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


def answered(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    decoder = load_decoder(folder, adapter, None, FP32, None, 1)
    assert isinstance(decoder, CachedDecoder)
    return decoder.start(IDS)


def adapter_of(model: Any, folder: Path) -> torch.Tensor:
    """An adapter that PEFT trains and saves on a model; gives the model's logits with it."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vis" not in name
    ]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    return logits_of(adapted.eval())


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_its_text_is_answered(kind: str, tied: bool, tmp_path: Path) -> None:
    model = made(kind, tmp_path, tied=tied)
    wanted = logits_of(model)
    assert apart(answered(tmp_path), wanted) < 1e-4
    assert apart(answered(under_other_names(tmp_path)), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["qwen3.5", "gemma 3"])
def test_adapters_of_the_multimodal_class_answer_and_merge(kind: str, tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    before = logits_of(made(kind, base))
    wanted = adapter_of(opened(kind, base), adapter)
    assert apart(before, wanted) > 1e-2
    assert apart(answered(base, adapter), wanted) < 1e-4
    merge(MergeConfig(base_model=str(base), lora_model=str(adapter), output_dir=str(merged)))
    assert apart(logits_of(opened(kind, merged)), wanted) < 1e-4
    assert apart(answered(merged), wanted) < 1e-4
    one, two = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert one.keys() == two.keys()
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}
    assert changed
    assert all("language_model" in name for name in changed)


def test_adapters_of_the_class_of_text_answer_and_merge(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    made("qwen3.5", base)
    wanted = adapter_of(load_model(base, torch.float32), adapter)
    assert any("model.layers." in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert apart(answered(base, adapter), wanted) < 1e-4
    merge(MergeConfig(base_model=str(base), lora_model=str(adapter), output_dir=str(merged), save_dtype="float32"))
    assert apart(logits_of(opened("qwen3.5", merged)), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["qwen3.5", "gemma 3"])
def test_what_is_trained_here_opens_in_peft_on_the_multimodal_class(kind: str, tmp_path: Path, data_file: Path) -> None:
    base, adapter = tmp_path / "model", tmp_path / "adapter"
    made(kind, base)
    layers = ["layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]
    train(adapter, base, data_file, max_steps=2, learning_rate=0.05, **LORA, lora_target_modules=layers)
    model = opened(kind, base)
    before = logits_of(model)
    found = logits_of(peft.PeftModel.from_pretrained(model, adapter).eval())
    assert apart(found, before) > 1e-3
    assert apart(answered(base, adapter), found) < 1e-4
    ours = load_model(base, torch.float32)
    load_adapter(ours, adapter)
    assert apart(logits_of(ours.eval()), found) < 1e-4
    if kind == "qwen3.5":  # as docs/training.md says
        text = load_model(base, torch.float32)
        names = {"model.language_model.": "model."}
        assert apart(logits_of(peft.PeftModel.from_pretrained(text, adapter, key_mapping=names).eval()), found) < 1e-4
