"""An adapter exported alone: base and B A, as llama.cpp adds it, are the merged weights; llama.cpp answers alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, lively, save_model, train
from transformers import AutoModelForCausalLM

from qingtune.adapters.merge_stored import MergedWeights
from qingtune.adapters.peft_files import read_adapter
from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig
from qingtune.errors import UserError
from qingtune.export.gguf_layout import layout_of
from qingtune.export.gguf_lora import lora_layout

Trained = Callable[..., Path]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": "q_proj=2,up_proj=7", "alpha_pattern": "k_proj=3"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"lora_target_modules": ALL}),
    "llama, its head too": ("llama", {"lora_target_modules": ALL, "with_head": True}),
    "qwen2": ("qwen2", {"lora_target_modules": ALL}),
    "qwen3, rank-stabilised": ("qwen3", {"lora_target_modules": ALL, "use_rslora": True}),
    "ranks and alphas": ("llama", {"lora_target_modules": ALL, **PATTERNS}),
    "ranks and alphas, rank-stabilised": ("llama", {"lora_target_modules": ALL, "use_rslora": True, **PATTERNS}),
}


@pytest.fixture
def trained(tmp_path: Path, data_file: Path) -> Trained:
    """A function that trains an adapter far enough to matter; returns its folder."""

    def train_adapter(kind: str, *, with_head: bool = False, **settings: Any) -> Path:
        model = save_model(tmp_path / "model", kind)
        train(tmp_path / "adapter", model, data_file, max_steps=3, learning_rate=0.05, **LORA | settings)
        if with_head:
            add_head(tmp_path / "adapter")
        return tmp_path / "adapter"

    return train_adapter


def add_head(adapter: Path) -> None:
    """Adapt the head too, as PEFT can."""
    path, draw = adapter / "adapter_model.safetensors", torch.Generator().manual_seed(0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (config["r"], 32), "B": (320, config["r"])}
    head = {
        f"base_model.model.lm_head.lora_{part}.weight": torch.randn(shape, generator=draw) * 0.1
        for part, shape in shapes.items()
    }
    save_file(load_file(path) | head, path, {"format": "pt"})


def export_lora(output: Path, adapter: Path, **settings: Any) -> Path:
    export(ExportConfig(output_dir=str(output), lora_model=str(adapter), format="gguf_lora", **settings))
    return output / f"{output.name}-{settings.get('quantize') or 'f32'}.gguf"


def changes(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What llama.cpp adds to each weight of the base, by its rules: alpha / rank B A."""
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = {name.rpartition(".lora_")[0] for name in tensors}
    pairs = {name: (tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")) for name in names}
    assert not tensors
    return {name: alpha / a.shape[-2] * b.astype(np.float64) @ a.astype(np.float64) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("case", ADAPTERS)
def test_base_and_adapter_are_the_merged_model(case: str, trained: Trained, tmp_path: Path) -> None:
    kind, settings = ADAPTERS[case]
    adapter = trained(kind, **settings)
    added = changes(export_lora(tmp_path / "lora", adapter))
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "base"), quantize=["f32"]))
    export(ExportConfig(lora_model=str(adapter), output_dir=str(tmp_path / "merged"), quantize=["f32"]))
    base, merged = (
        {
            tensor.name: tensor.data.astype(np.float64)
            for tensor in GGUFReader(tmp_path / f"{name}/{name}-f32.gguf").tensors
        }
        for name in ("base", "merged")
    )
    assert GGUFReader(tmp_path / "lora/lora-f32.gguf").fields["general.architecture"].contents() == kind
    for name, weight in merged.items():
        assert np.allclose(base[name] + added.get(name, 0.0), weight, rtol=0, atol=1e-5), name
        assert (name in added) == (not np.array_equal(base[name], weight)), name
    stored = read_adapter(adapter)
    assert len(added) == len(stored.layers)
    weights = MergedWeights(tmp_path / "model", stored)
    largest = max(float((weights.read(name) - weights.unchanged(name)).abs().max()) for name in stored.layers)
    assert max(float(np.abs(change).max()) for change in added.values()) == pytest.approx(largest, rel=1e-3)
    assert largest > 0.05


def test_an_adapter_that_began_as_a_part_of_the_base_is_made_plain(trained: Trained, tmp_path: Path) -> None:
    adapter = trained("llama", lora_target_modules=["q_proj", "down_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"init_lora_weights": "pissa"})
    )  # as PEFT saves it
    added = changes(export_lora(tmp_path / "lora", adapter))
    weights = MergedWeights(tmp_path / "model", read_adapter(adapter))
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = (weights.read(name) - weights.unchanged(name)).numpy()
    assert np.allclose(added["blk.1.ffn_down.weight"], wanted, rtol=0, atol=1e-5)


def test_forms_cards_and_files(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained("llama")
    wanted = changes(export_lora(tmp_path / "a", adapter))
    told = capsys.readouterr()
    assert "llama-cli -m BASE.gguf --lora" in told.out
    assert "ollama" not in told.out
    assert f"export --base_model {tmp_path / 'model'} --output_dir" in told.out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"a-f32.gguf", "README.md", "qingtune_files.json"}
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "llama-cli -m BASE.gguf --lora a-f32.gguf --jinja" in card
    assert str(tmp_path) not in card
    for form in ("f16", "q8_0"):
        path = export_lora(tmp_path / form, adapter, quantize=form)
        found = changes(path)
        for name, change in wanted.items():
            error = np.linalg.norm(found[name] - change) / np.linalg.norm(change)
            assert 0 < error < (1e-3 if form == "f16" else 0.02)
    kinds = {tensor.name.rpartition("_")[2]: tensor.tensor_type for tensor in GGUFReader(path).tensors}
    assert kinds == {"a": Kind.Q8_0, "b": Kind.F16}  # of B, rows are as short as the rank


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, r"trained in full \(modules_to_save: lm_head\)"),
        ({"with_head": True}, r"lm_head.weight, which is the embedding in this base"),
    ],
)
def test_what_is_no_sum_is_refused(settings: dict[str, Any], reason: str, trained: Trained, tmp_path: Path) -> None:
    adapter = trained("qwen2", **settings)
    with pytest.raises(UserError, match=f"{reason}.*leave out --format gguf_lora"):
        export_lora(tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()


def test_wrong_settings_and_other_bases_are_refused(trained: Trained, tmp_path: Path) -> None:
    adapter = trained("llama")
    with pytest.raises(UserError, match=r"quantize: q4_k_m is not for adapters\. Choose from f32, f16, bf16, q8_0"):
        export_lora(tmp_path / "out", adapter, quantize="f16,q4_k_m")
    with pytest.raises(UserError, match=r"format: gguf_lora is an adapter's format\. Pass --lora_model"):
        export(ExportConfig(base_model=str(tmp_path), output_dir=str(tmp_path / "out"), format="gguf_lora"))
    lora = export_lora(tmp_path / "lora", adapter)
    with pytest.raises(UserError, match=r"lora-f32\.gguf: this file holds an adapter, not a model"):
        export(ExportConfig(base_model=str(lora), output_dir=str(tmp_path / "out")))
    path = adapter / "adapter_model.safetensors"
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path)
    with pytest.raises(UserError, match=r"layers\.7.* does not exist in the base\. Pass the base model"):
        export_lora(tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()


SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 64, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "eos_token_id": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True,
}  # fmt: skip
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# By configuration: what PEFT is to adapt. By "all-linear" it would take Qwen3-MoE's routers too.
BY_PEFT: dict[str, dict[str, Any]] = {
    "Qwen3_5TextConfig": {"target_modules": "all-linear"},
    "Qwen3MoeConfig": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **EXPERTS},
    "Qwen3_5MoeTextConfig": {"target_modules": "all-linear", **EXPERTS},
}


def adapter_by_peft(folder: Path, kind: str) -> Path:
    """An adapter by PEFT on all that a tiny model of BY_PEFT lets it adapt; the model is in folder/model."""
    torch.manual_seed(0)
    model = lively(AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES)))
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **BY_PEFT[kind]))
    adapted.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "model")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter"


CHANGED = {
    "Qwen3_5TextConfig": {
        "blk.0.ssm_out.weight", "blk.0.attn_qkv.weight", "blk.0.ssm_alpha.weight", "blk.3.attn_q.weight"
    },
    "Qwen3MoeConfig": {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight"},
    "Qwen3_5MoeTextConfig": {
        "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight", "blk.0.ssm_out.weight",
        "blk.0.ffn_gate_shexp.weight", "blk.3.ffn_gate_inp_shexp.weight",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_PEFT)
def test_linear_attention_and_experts_are_changed_as_by_merging(kind: str, tmp_path: Path) -> None:
    adapter = adapter_by_peft(tmp_path, kind)
    added = changes(export_lora(tmp_path / "lora", adapter))
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "base"), quantize=["f32"]))
    export(ExportConfig(lora_model=str(adapter), output_dir=str(tmp_path / "merged"), quantize=["f32"]))
    base, merged = (
        {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / f"{name}/{name}-f32.gguf").tensors}
        for name in ("base", "merged")
    )
    assert CHANGED[kind] < set(added)
    for name, weight in merged.items():
        change = np.asarray(added.get(name, np.zeros(1))).reshape(weight.shape if name in added else 1)
        assert np.allclose(base[name] + change, weight, rtol=0, atol=2e-5), name
        assert (name in added) == (not np.array_equal(base[name], weight)), name


@pytest.mark.parametrize("kind", BY_PEFT)
def test_llama_cpp_puts_an_adapter_on_linear_attention_and_experts(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    adapter = adapter_by_peft(tmp_path, kind)
    lora = export_lora(tmp_path / "lora", adapter)
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "base"), quantize=["f32"]))
    assert_alike(llama_cpp, tmp_path, lora, adapter)


def test_an_adapter_of_some_experts_alone_is_refused(tmp_path: Path) -> None:
    adapter = read_adapter(adapter_by_peft(tmp_path, "Qwen3MoeConfig"))
    weights = MergedWeights(tmp_path / "model", adapter)
    assert weights.adapter is not None
    del weights.adapter.layers["model.layers.1.mlp.experts.2.up_proj.weight"]
    layout = layout_of(tmp_path / "model", weights.shapes)
    with pytest.raises(UserError, match=r"does not change all experts of blk\.1\.ffn_up_exps\.weight by one rank"):
        lora_layout(weights.adapter, layout, weights.unchanged)


@pytest.mark.parametrize("case", ADAPTERS)
def test_llama_cpp_answers_as_base_and_adapter(case: str, trained: Trained, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    kind, settings = ADAPTERS[case]
    adapter = trained(kind, **settings)
    lora = export_lora(tmp_path / "lora", adapter)
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "base"), quantize=["f32"]))
    assert_alike(llama_cpp, tmp_path, lora, adapter)


def assert_alike(llama_cpp: Any, folder: Path, lora: Path, adapter: Path) -> None:
    """llama.cpp's logits of base and adapter are PEFT's, and so is the likeliest token everywhere."""
    from peft import PeftModel

    prompt = list(range(3, 40))
    theirs = llama_cpp.Llama(
        str(folder / "base" / "base-f32.gguf"), lora_path=str(lora), n_ctx=128, n_threads=1, logits_all=True,
        verbose=False, type_k=0, type_v=0,
    )  # fmt: skip
    theirs.eval(prompt)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), str(adapter)).eval()
    with torch.no_grad():
        wanted = ours(input_ids=torch.tensor([prompt])).logits[0].numpy()
    assert np.abs(theirs.scores[: len(prompt)] - wanted).max() < 1e-3 * wanted.std()
    assert np.array_equal(theirs.scores[: len(prompt)].argmax(1), wanted.argmax(1))
