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
from safetensors.torch import load_file, save_file
from tiny_runs import lively

from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig
from qingtune.errors import UserError
from qingtune.export.gguf_architectures import ARCHITECTURES

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
# By a name of their own: the class of the configuration, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {**HEADS, "sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADS, **EXPERTS}),
    "phi3": ("Phi3Config", {}),
    "phi3 tied, partial rotary": (
        "Phi3Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
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
}  # fmt: skip
READ_BY_TRANSFORMERS = ["qwen3_moe", "phi3", "gemma3"]
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


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_alike(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = save(tmp_path / "model", name)
    path = export_f32(tmp_path / "model", tmp_path / "out")
    theirs = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    theirs.eval(IDS)
    wanted = logits_of(model)
    found = theirs.scores[: len(IDS)]
    # ggml takes GELU from a table in fp16.
    assert np.abs(found - wanted).max() < (0.02 if "gemma" in name else 1e-3) * wanted.std()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= (0.95 if "gemma" in name else 1)


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


SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 32,
        "qwen3moe.feed_forward_length": 64, "qwen3moe.attention.key_length": 16,
    },
    "phi3 tied, partial rotary": {"phi3.rope.dimension_count": 4, "phi3.context_length": 256},
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
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, not 16"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"layer_types": ["sliding_attention", *["full_attention"] * 6]}, "equal distances"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_act is silu"),
        ("qwen3_5", {"linear_value_head_dim": 32}, "differ in size"),
        ("qwen3_5", {"head_dim": 16}, "mrope_section .* is longer than a head of 16"),
        ("qwen3_5", {"layer_types": ["full_attention", *["linear_attention"] * 3]}, "equal distances"),
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


@pytest.mark.parametrize("name", ["mistral", "phi3"])
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


def test_of_a_model_that_sees_the_part_that_reads_and_writes_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = save(tmp_path / "text", "qwen3_5 tied, as many values as keys")
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(
        text_config=text.config.to_dict() | {"tie_word_embeddings": False},
        vision_config=sizes,
        tie_word_embeddings=True,
    )
    whole = transformers.Qwen3_5ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    save_file(
        stored | {"mtp.fc.weight": torch.zeros(32, 64)}, tmp_path / "whole" / "model.safetensors", {"format": "pt"}
    )
    found = GGUFReader(export_f32(tmp_path / "whole", tmp_path / "a"))
    told = capsys.readouterr().err
    assert "Note: The file does not hold the vision tower." in told
    assert "Note: The file does not hold the layers that predict several tokens (mtp)." in told
    wanted = {tensor.name: tensor.data for tensor in GGUFReader(export_f32(tmp_path / "text", tmp_path / "b")).tensors}
    assert {tensor.name for tensor in found.tensors} == set(wanted)
    assert all(np.array_equal(tensor.data, wanted[tensor.name]) for tensor in found.tensors)


def test_experts_that_are_missing_are_found_out(tmp_path: Path) -> None:
    save(tmp_path / "model", "qwen3_moe")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"some experts of model\.layers\.1\.mlp\.experts\.up_proj\.weight are missing"):
        export_f32(tmp_path / "model", tmp_path / "out")


def test_every_architecture_that_can_be_exported_is_tested() -> None:
    tested = {config.removesuffix("Config").lower() for config, _ in MODELS.values()} | {"qwen2", "qwen3", "llama"}
    assert {name.replace("_", "") for name in ARCHITECTURES} == {name.replace("_", "") for name in tested}
