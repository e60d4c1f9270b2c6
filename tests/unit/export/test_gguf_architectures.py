"""Each architecture's file holds what llama.cpp reads: outside readers compute from it what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer
from gguf import GGUFReader
from gguf_models import HEADS, LONGROPE, MODELS, SIZES, YARN, assert_llama_cpp_answers, export_f32, logits_of, save
from safetensors.torch import load_file, save_file

from qingtune.errors import UserError
from qingtune.export.gguf_architectures import ARCHITECTURES
from qingtune.models.find import find_model
from qingtune.models.load import load_model, local_folder

READ_BY_TRANSFORMERS = ["qwen3_moe", "phi3", "gemma2", "gemma3"]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = save(tmp_path / "model", name)
    assert_llama_cpp_answers(export_f32(tmp_path / "model", tmp_path / "out"), model, gemma="gemma" in name)


def read_by_transformers(path: Path, config: Any) -> Any:
    """The model that Transformers reads, with the configuration of the one that was written."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file_as_the_model(name: str, tmp_path: Path) -> None:
    model = save(tmp_path / "model", name)
    path = export_f32(tmp_path / "model", tmp_path / "out")
    found = logits_of(read_by_transformers(path, model.config))
    assert np.abs(found - logits_of(model)).max() < 1e-4


def test_mistral_is_llama_by_another_name(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "mistral")
    path = export_f32(tmp_path / "model", tmp_path / "out")
    assert GGUFReader(path).fields["general.architecture"].contents() == "llama"
    found = logits_of(read_by_transformers(path, transformers.LlamaConfig(**SIZES, **HEADS)))
    assert np.abs(found - logits_of(model)).max() < 1e-4


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_POSITIONS = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
READ_BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR_POSITIONS}),
    "qwen3, linear": ("Qwen3Config", {**HEADS, "rope_parameters": LINEAR_POSITIONS, "tie_word_embeddings": True}),
    **{name: model for name, model in MODELS.items() if "ministral3" not in name},
}


@pytest.mark.parametrize("name", READ_BACK)
def test_the_file_is_read_back_as_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, name, READ_BACK[name])
    save(tmp_path / "model", name)
    path = export_f32(tmp_path / "model", tmp_path / "out")
    folder = local_folder(find_model(str(path), None, "auto"), str(tmp_path))
    wanted = load_model(tmp_path / "model", torch.float32)
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.copy_(parameter.bfloat16())  # as it is converted
    found = logits_of(load_model(folder, torch.float32))
    assert np.abs(found - logits_of(wanted)).max() < 2e-3 * logits_of(wanted).std()
    make_tokenizer().save_pretrained(folder)  # of Gemma's, Transformers expects SentencePiece
    again = GGUFReader(export_f32(folder, tmp_path / "again"))
    first = GGUFReader(path)
    assert {tensor.name for tensor in again.tensors} == {tensor.name for tensor in first.tensors}
    kind = first.fields["general.architecture"].contents()
    for key, field in first.fields.items():
        if key.startswith(f"{kind}."):
            value = field.contents()
            about = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert again.fields[key].contents() == about, key


def test_what_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", "ministral3")
    path = export_f32(tmp_path / "model", tmp_path / "out")
    with pytest.raises(UserError, match=r"Transformers cannot read this GGUF file .*mistral3"):
        local_folder(find_model(str(path), None, "auto"), str(tmp_path))


SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 32,
        "qwen3moe.feed_forward_length": 64, "qwen3moe.attention.key_length": 16,
    },
    "qwen3_5_moe": {
        "qwen35moe.expert_count": 4, "qwen35moe.expert_used_count": 2, "qwen35moe.expert_feed_forward_length": 32,
        "qwen35moe.expert_shared_feed_forward_length": 48, "qwen35moe.ssm.time_step_rank": 4,
    },
    "ministral3": {
        "mistral3.rope.scaling.type": "yarn", "mistral3.rope.scaling.factor": 16.0,
        "mistral3.rope.scaling.original_context_length": 16, "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
        "mistral3.rope.scaling.yarn_beta_fast": 32.0, "mistral3.rope.scaling.yarn_beta_slow": 1.0,
        "mistral3.attention.temperature_scale": float(np.float32(0.3)),
    },
    "phi3 longrope": {
        "phi3.rope.scaling.original_context_length": 256,
        "phi3.rope.scaling.attn_factor": float(np.float32(np.sqrt(1 + np.log(2) / np.log(256)))),
    },
    "phi3 tied, partial rotary": {"phi3.rope.dimension_count": 4, "phi3.context_length": 256},
    "gemma2": {
        "gemma2.attention.sliding_window": 8, "gemma2.attn_logit_softcapping": 5.0,
        "gemma2.final_logit_softcapping": 7.0, "gemma2.attention.key_length": 16,
    },
    "gemma3 linear": {
        "gemma3.attention.sliding_window": 8, "gemma3.attention.sliding_window_pattern": 6,
        "gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0,
    },
    "qwen3_5": {
        "qwen35.rope.dimension_count": 16, "qwen35.rope.dimension_sections": [11, 11, 10, 0],
        "qwen35.full_attention_interval": 4, "qwen35.ssm.conv_kernel": 4, "qwen35.ssm.state_size": 16,
        "qwen35.ssm.group_count": 2, "qwen35.ssm.time_step_rank": 4, "qwen35.ssm.inner_size": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_that_llama_cpp_reads(name: str, tmp_path: Path) -> None:
    save(tmp_path / "model", name)
    fields = GGUFReader(export_f32(tmp_path / "model", tmp_path / "out")).fields
    assert {key: fields[key].contents() for key in SETTINGS[name]} == SETTINGS[name]


def test_tensors_of_qwen3_5_are_those_that_llama_cpp_reads(tmp_path: Path) -> None:
    """Names and shapes as in llama.cpp's src/models/qwen35.cpp; value heads in turn for each of the key heads."""
    model = save(tmp_path / "model", "qwen3_5")
    reader = GGUFReader(export_f32(tmp_path / "model", tmp_path / "out"))
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    shapes = {name.removeprefix("blk.0."): data.shape for name, data in found.items() if name.startswith("blk.0.")}
    assert shapes == {
        "attn_gate.weight": (64, 32), "attn_norm.weight": (32,), "attn_qkv.weight": (128, 32),
        "ffn_down.weight": (32, 64), "ffn_gate.weight": (64, 32), "ffn_up.weight": (64, 32),
        "post_attention_norm.weight": (32,), "ssm_a": (4,), "ssm_alpha.weight": (4, 32), "ssm_beta.weight": (4, 32),
        "ssm_conv1d.weight": (128, 4), "ssm_dt.bias": (4,), "ssm_norm.weight": (16,), "ssm_out.weight": (32, 64),
    }  # fmt: skip
    full = {name.removeprefix("blk.3."): data.shape for name, data in found.items() if name.startswith("blk.3.attn")}
    assert full == {
        "attn_k.weight": (128, 32), "attn_k_norm.weight": (64,), "attn_norm.weight": (32,),
        "attn_output.weight": (32, 256), "attn_q.weight": (512, 32), "attn_q_norm.weight": (64,),
        "attn_v.weight": (128, 32),
    }  # fmt: skip
    layer, heads = model.model.layers[0], [0, 2, 1, 3]  # of 2 keys with 2 values each
    places = np.concatenate([np.arange(16) + 16 * head for head in heads])
    linear = {name: parameter.detach().numpy() for name, parameter in layer.linear_attn.named_parameters()}
    assert np.allclose(found["blk.0.ssm_a"], -np.exp(linear["A_log"][heads]), rtol=1e-6)
    assert np.array_equal(found["blk.0.ssm_dt.bias"], linear["dt_bias"][heads])
    assert np.array_equal(found["blk.0.ssm_beta.weight"], linear["in_proj_b.weight"][heads])
    assert np.array_equal(found["blk.0.attn_gate.weight"], linear["in_proj_z.weight"][places])
    assert np.array_equal(found["blk.0.ssm_out.weight"], linear["out_proj.weight"][:, places])
    together = np.concatenate([np.arange(64), 64 + places])
    assert np.array_equal(found["blk.0.attn_qkv.weight"], linear["in_proj_qkv.weight"][together])
    assert np.array_equal(found["blk.0.ssm_conv1d.weight"], linear["conv1d.weight"][together, 0])
    assert np.array_equal(found["blk.0.ssm_norm.weight"], linear["norm.weight"])
    assert np.array_equal(found["blk.0.attn_norm.weight"], 1 + layer.input_layernorm.weight.detach().numpy())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"model.layers.1.mlp.*_proj.weight has no place"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, not 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is not set"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is not set"),
        ("gemma2", {"tie_word_embeddings": False}, "its head is not its embedding"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "do not alternate"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, not 16"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"layer_types": ["sliding_attention", *["full_attention"] * 6]}, "equal distances"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_act is silu"),
        ("qwen3_5", {"linear_value_head_dim": 32}, "differ in size"),
        ("qwen3_5", {"head_dim": 16}, "mrope_section .* is longer than a head of 16"),
        ("qwen3_5", {"layer_types": ["full_attention", *["linear_attention"] * 3]}, "equal distances"),
        ("qwen3_5_moe", {"linear_value_head_dim": 32}, "differ in size"),
        ("ministral3", {"rope_parameters": YARN | {"truncate": False}}, "yarn with truncate False"),
        ("mistral", {"rope_parameters": LONGROPE, "head_dim": 8}, "its rope_type longrope"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save(tmp_path / "model", name, **changes)
    with pytest.raises(UserError, match=reason):
        export_f32(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_phi3_holds_both_sets_of_factors_and_says_when_llama_cpp_takes_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", "phi3 longrope")
    found = {
        tensor.name: tensor.data for tensor in GGUFReader(export_f32(tmp_path / "model", tmp_path / "out")).tensors
    }
    for length in ("short", "long"):
        wanted = np.array(LONGROPE[f"{length}_factor"], np.float32)
        assert np.array_equal(found[f"rope_factors_{length}.weight"], wanted)
    assert "where its context (-c) is above 256, Transformers where the text is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mistral", "ministral", "ministral3", "phi3"])
def test_a_window_of_all_layers_bounds_what_the_file_says_it_reads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", name, sliding_window=100)
    fields = GGUFReader(export_f32(tmp_path / "model", tmp_path / "out")).fields
    kind = fields["general.architecture"].contents()
    assert fields[f"{kind}.context_length"].contents() == 100
    assert f"no sliding window for {kind}: the file says that it reads 100 tokens" in capsys.readouterr().err
    save(tmp_path / "wide", name, sliding_window=256)
    fields = GGUFReader(export_f32(tmp_path / "wide", tmp_path / "other")).fields
    assert fields[f"{kind}.context_length"].contents() == 256


def test_experts_stored_together_and_one_by_one_make_the_same_file(tmp_path: Path) -> None:
    model = save(tmp_path / "one by one", "qwen3_5_moe")
    save(tmp_path / "together", "qwen3_5_moe")
    path = tmp_path / "together" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".experts." not in name}
    experts = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".experts." in name}
    save_file(tensors | experts, path, {"format": "pt"})
    assert set(load_file(path)) != set(load_file(tmp_path / "one by one" / "model.safetensors"))
    one, other = (
        {tensor.name: tensor.data for tensor in GGUFReader(export_f32(tmp_path / name, tmp_path / new)).tensors}
        for name, new in (("one by one", "a"), ("together", "b"))
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    up = model.model.layers[1].mlp.experts.gate_up_proj.detach().numpy()[:, 32:]
    assert np.array_equal(one["blk.1.ffn_up_exps.weight"], up)


def test_experts_that_are_missing_are_found_out(tmp_path: Path) -> None:
    save(tmp_path / "model", "qwen3_moe")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"some experts of model\.layers\.1\.mlp\.experts\.up_proj\.weight are missing"):
        export_f32(tmp_path / "model", tmp_path / "out")


def test_every_architecture_that_can_be_exported_is_tested() -> None:
    tested = {config.removesuffix("Config").lower() for config, _ in MODELS.values()} | {"qwen3", "llama"}
    assert {name.replace("_", "") for name in ARCHITECTURES} == {name.replace("_", "") for name in tested}
