"""Of a multimodal checkpoint the text is exported, and the same as of the text alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from gguf import GGUFReader
from gguf_models import assert_llama_cpp_answers, export_f32, save
from multimodal import made
from safetensors.torch import load_file, save_file

from qingtune.models.load import load_model

VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5 tied, as many values as keys": ("Qwen3_5", {"vision_config": VISION}),
    "qwen3_5_moe": ("Qwen3_5Moe", {"vision_config": VISION}),
    "gemma3": ("Gemma3", {"vision_config": SIGLIP, "mm_tokens_per_image": 4}),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_of_a_multimodal_model_the_text_part_is_exported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = save(tmp_path / "text", name)
    kind, settings = MULTIMODAL[name]
    tied = bool(text.config.tie_word_embeddings)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text.config.to_dict() | {"tie_word_embeddings": False}, tie_word_embeddings=tied, **settings
    )
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    more = {"mtp.fc.weight": torch.zeros(32, 64)}
    save_file(stored | more, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    found = GGUFReader(export_f32(tmp_path / "whole", tmp_path / "a"))
    reported = capsys.readouterr().err
    assert "Note: The file does not hold the vision tower." in reported
    assert "Note: The file does not hold the layers that predict several tokens (mtp)." in reported
    alone = GGUFReader(export_f32(tmp_path / "text", tmp_path / "b"))
    wanted = {tensor.name: tensor.data for tensor in alone.tensors}
    assert {tensor.name for tensor in found.tensors} == set(wanted)
    assert all(np.array_equal(tensor.data, wanted[tensor.name]) for tensor in found.tensors)
    first, second = (
        {
            key: field.contents()
            for key, field in one.fields.items()
            if key.startswith(f"{one.fields['general.architecture'].contents()}.") or key.endswith("bos_token_id")
        }
        for one in (found, alone)
    )
    assert first == second
    assert first["tokenizer.ggml.bos_token_id"] == 0


# By the kinds of tests/multimodal.py: llama.cpp's architecture of the text alone.
VISUAL = {
    "qwen2-vl": "qwen2", "qwen2.5-vl": "qwen2", "qwen3-vl": "qwen3", "mistral small": "llama", "ministral": "mistral3",
    "internvl": "qwen3", "llava": "llama",
}  # fmt: skip


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", VISUAL)
def test_text_of_other_multimodal_models_is_exported(
    kind: str, older: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(kind, tmp_path / "whole", tied=False)
    text = load_model(tmp_path / "whole", torch.float32)
    if older:  # the names of older files, without a head that the class may tie
        path = tmp_path / "whole" / "model.safetensors"
        tensors = load_file(path)
        save_file({old_name(name, kind): tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    text.save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    found = GGUFReader(export_f32(tmp_path / "whole", tmp_path / "a"))
    assert "Note: The file does not hold the vision tower." in capsys.readouterr().err
    alone = GGUFReader(export_f32(tmp_path / "text", tmp_path / "b"))
    wanted = {tensor.name: tensor.data for tensor in alone.tensors}
    assert {tensor.name for tensor in found.tensors} == set(wanted)
    assert all(np.array_equal(tensor.data, wanted[tensor.name]) for tensor in found.tensors)
    architecture = VISUAL[kind]
    first, second = (
        {
            key: field.contents()
            for key, field in one.fields.items()
            if key.startswith((f"{architecture}.", "general.arch"))
        }
        for one in (found, alone)
    )
    assert first == second
    assert first["general.architecture"] == architecture
    if importlib.util.find_spec("llama_cpp"):
        assert_llama_cpp_answers(tmp_path / "a" / "a-f32.gguf", text)


def old_name(name: str, kind: str) -> str:
    """Of a tensor in files of older versions of Transformers."""
    if kind.startswith("qwen"):
        for now in ("model.language_model.", "model.visual."):
            if name.startswith(now):
                return name.replace(now, "model." if "language" in now else "visual.", 1)
        return name
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
