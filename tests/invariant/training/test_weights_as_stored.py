"""A run in fp32 on weights held in the 16 bits in which they are stored is the one on fp32 weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, make_tokenizer, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, QLORA4, QLORA8, assert_equal, lively_model, metrics, train, weights, without_gpu

from qingtune.config.training import TrainConfig
from qingtune.kernels.device import choose_hardware
from qingtune.kernels.native import products
from qingtune.training.model import load_adapted_model

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "val_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_samples": 1,
}
KINDS = {
    "qwen2": ("qwen2", LORA, torch.bfloat16),
    "llama in fp16": ("llama", LORA, torch.float16),
    "llama, head apart": ("llama untied", LORA, torch.bfloat16),
    "general path": ("vaultgemma", LORA, torch.bfloat16),
    "dora": ("qwen2", {**LORA, "use_dora": True}, torch.bfloat16),
    "head trained": ("qwen2", {**LORA, "modules_to_save": ["lm_head"]}, torch.bfloat16),
    "adapters taken out of the weights": ("qwen2", {**LORA, "init_lora_weights": "pissa"}, torch.bfloat16),
    "in 4 bits": ("qwen2", QLORA4, torch.bfloat16),
    "in 8 bits": ("qwen2", QLORA8, torch.bfloat16),
    "full": ("qwen2", {}, torch.bfloat16),
}


def _save(folder: Path, kind: str, dtype: torch.dtype, dtype_of_file: torch.dtype) -> Path:
    """The folder of a lively model whose weights are numbers of the dtype, kept in that of the file."""
    changes = {"tie_word_embeddings": False} if kind.endswith(" untied") else {}
    model = lively_model(kind.removesuffix(" untied"), **changes).to(dtype).to(dtype_of_file)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_the_same(kind: str, tmp_path: Path) -> None:
    architecture, method, dtype = KINDS[kind]
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(16))
    for name, held in (("stored", dtype), ("wide", torch.float32)):
        model = _save(tmp_path / f"{name}-model", architecture, dtype, held)
        train(tmp_path / name, model, data, **SETTINGS | method)
    assert metrics(tmp_path / "stored") == metrics(tmp_path / "wide")
    if kind != "full":  # whose result is stored as its base was
        assert_equal(weights(tmp_path / "stored"), weights(tmp_path / "wide"))


@pytest.mark.parametrize(
    ("settings", "kind", "matrices"),
    [
        ({}, "qwen2", torch.bfloat16),
        ({"init_lora_weights": "pissa"}, "qwen2", torch.float32),
        ({}, "vaultgemma", torch.float32),
        ({"use_qlora": True, "quantization_bit": 8}, "qwen2", torch.float32),
    ],
)
def test_matrices_stay_in_16_bits_where_kernels_read_them(
    settings: dict[str, Any], kind: str, matrices: torch.dtype, tmp_path: Path
) -> None:
    folder = _save(tmp_path / "model", kind, torch.bfloat16, torch.bfloat16)
    config = TrainConfig(use_lora=True, lora_r=4, lora_alpha=8.0, cache_dir=str(tmp_path / "cache"), **settings)
    with without_gpu():
        model = load_adapted_model(config, folder, choose_hardware(bf16=False))
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    found = {parameter.dtype for parameter in frozen.values() if parameter.ndim == 2}
    assert found == {matrices}
    assert {parameter.dtype for parameter in frozen.values() if parameter.ndim == 1} == {torch.float32}


def test_weights_of_several_dtypes_are_widened(tmp_path: Path) -> None:
    folder = _save(tmp_path / "model", "qwen2", torch.bfloat16, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float() + 1e-5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = TrainConfig(use_lora=True, lora_r=4, lora_alpha=8.0)
    with without_gpu():
        model = load_adapted_model(config, folder, choose_hardware(bf16=False))
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").base.weight, tensors[name])


def test_without_a_compiler_the_run_is_the_same_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(16))
    model = _save(tmp_path / "model", "qwen2", torch.bfloat16, torch.bfloat16)
    train(tmp_path / "in-c", model, data, **SETTINGS | LORA)
    monkeypatch.setattr(products, "_library", lambda: None)
    train(tmp_path / "plain", model, data, **SETTINGS | LORA)
    one, two = ([line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("in-c", "plain"))
    assert one == pytest.approx(two, rel=1e-5)
