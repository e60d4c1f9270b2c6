"""Adapter files go both ways: ours open in PEFT, PEFT's open here, with the same logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_runs import LORA, lively_model, logits_of, move_adapters, save_model, train
from transformers import AutoModelForCausalLM

from qingtune.adapters.base_of import find_base
from qingtune.adapters.lora import add_lora, lora_layers
from qingtune.adapters.peft_files import load_adapter, read_adapter, read_adapter_config, save_adapter
from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig, MergeConfig
from qingtune.errors import UserError
from qingtune.models.load import load_model

BOUND = 1e-5  # of the logits' largest value, in fp32
ATTENTION = "model.layers.1.self_attn"
CASES = [
    ("qwen2", None),
    ("qwen2", ["q_proj", "v_proj"]),
    ("qwen2", [f"{ATTENTION}.q_proj", "model.layers.0.mlp.up_proj"]),
    ("qwen2", ["layers.1.self_attn.o_proj"]),
    ("qwen3", None),
    ("qwen3", ["k_proj", "down_proj"]),
    ("qwen3", [f"{ATTENTION}.k_proj"]),
    ("llama", None),
    ("llama", ["gate_proj"]),
    ("llama", [f"{ATTENTION}.v_proj"]),
    ("gpt2", None),
    ("gpt2", ["c_attn"]),
    ("gpt2", ["c_proj"]),
    ("gpt2", ["transformer.h.1.mlp.c_proj"]),
    ("mistral", None),
]


def assert_same_logits(one: torch.Tensor, two: torch.Tensor) -> None:
    assert float((one - two).abs().max()) < BOUND * float(two.abs().max())


@pytest.mark.parametrize(("kind", "names"), CASES, ids=str)
def test_ours_opens_in_peft(kind: str, names: list[str] | None, tmp_path: Path) -> None:
    model = lively_model(kind)
    base = logits_of(model)
    add_lora(model, names, r=3, alpha=5, dropout=0.1)
    move_adapters(model)
    save_adapter(model, tmp_path, "the base", 0.1)
    ours = logits_of(model)
    assert float((ours - base).abs().max()) > 1e-2  # the adapter matters

    opened = PeftModel.from_pretrained(lively_model(kind), str(tmp_path))
    assert_same_logits(logits_of(opened), ours)
    wrapped = {name.removeprefix("base_model.model.") for name, x in opened.named_modules() if isinstance(x, LoraLayer)}
    assert wrapped == set(lora_layers(model))  # no layer more: PEFT would train it along
    config = opened.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.1)
    assert config.base_model_name_or_path == "the base"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is (kind == "gpt2")
    assert_same_logits(logits_of(opened.merge_and_unload()), ours)

    again = lively_model(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), ours)


@pytest.mark.parametrize(("kind", "names"), CASES, ids=str)
def test_peft_s_opens_here(kind: str, names: list[str] | None, tmp_path: Path) -> None:
    peft = get_peft_model(
        lively_model(kind),
        LoraConfig(
            r=3, lora_alpha=5, lora_dropout=0.1, target_modules=names or "all-linear", init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    peft.save_pretrained(str(tmp_path))
    model = lively_model(kind)
    base = logits_of(model)
    load_adapter(model, tmp_path)
    assert_same_logits(logits_of(model), logits_of(peft))
    assert float((logits_of(model) - base).abs().max()) > 1e-2


@pytest.mark.parametrize("settings", [LORA, LORA | {"use_qlora": True, "lora_target_modules": "q_proj,down_proj"}])
def test_result_of_a_run_opens_in_peft(settings: dict[str, Any], tmp_path: Path, data_file: Path) -> None:
    base = save_model(tmp_path / "model")
    train(tmp_path / "out", base, data_file, max_steps=2, **settings)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, tmp_path / "out")
    assert_same_logits(logits_of(opened), logits_of(model))
    assert opened.peft_config["default"].base_model_name_or_path == str(base)


# Settings that change what an adapter computes. PEFT writes each; loading one as plain LoRA would be wrong in silence.
UNSUPPORTED: dict[str, Any] = {
    "bias": "all",
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.up_proj.weight"],
    "lora_bias": True,
    "layer_replication": [[0, 2], [0, 2]],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"rank": 1},
}
# Starts that take a part out of the base that the files do not tell; the others are in test_variants.py.
UNTOLD = ("pissa_niter_4", "corda", "loftq", "lora_ga", "something new")
WRITTEN_BY_PEFT = ("bias", "lora_bias", "trainable_token_indices", "alora_invocation_tokens")


def assert_refused(folder: Path, name: str) -> None:
    model = lively_model("llama")
    for read in (read_adapter_config, read_adapter, lambda folder: load_adapter(model, folder)):
        with pytest.raises(UserError, match=name):
            read(folder)
    assert not lora_layers(model)


@pytest.mark.parametrize("name", WRITTEN_BY_PEFT)
def test_adapters_that_compute_otherwise_are_refused_by_name(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", name: UNSUPPORTED[name]}
    get_peft_model(lively_model("llama"), LoraConfig(**settings)).save_pretrained(str(tmp_path))
    assert_refused(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "value"), [*UNSUPPORTED.items(), *(("init_lora_weights", start) for start in UNTOLD)], ids=str
)
def test_every_kind_that_is_not_supported_is_named(name: str, value: Any, tmp_path: Path) -> None:
    model = lively_model("llama")
    add_lora(model, ["q_proj"], r=3, alpha=5, dropout=0.0)
    save_adapter(model, tmp_path, "base", 0.0)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert_refused(tmp_path, f"{name}.*{value}" if name == "init_lora_weights" else name)


def test_every_setting_of_peft_s_is_decided_on() -> None:
    """A new PEFT may bring settings that change what an adapter computes: each is to be looked at once."""
    known = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"}
    known |= {"peft_version", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "use_rslora"}
    known |= {"use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "ensure_weight_tying"}
    # They only say which layers are adapted, as the tensors' names do, or how training went about it.
    known |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"}
    known |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"}
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set(UNSUPPORTED)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_ways_to_start_that_leave_the_base_alone_are_fine(start: bool | str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)  # type: ignore
    peft = get_peft_model(lively_model("llama"), config)
    peft.save_pretrained(str(tmp_path))
    model = lively_model("llama")
    load_adapter(model, tmp_path)
    assert_same_logits(logits_of(model), logits_of(peft))


def test_other_kinds_and_other_models_are_refused(tmp_path: Path) -> None:
    model = lively_model("qwen2")
    add_lora(model, ["q_proj"], r=3, alpha=5, dropout=0.0)
    save_adapter(model, tmp_path, "base", 0.0)
    with pytest.raises(UserError, match="another model: this one has no layer"):
        load_adapter(lively_model("gpt2"), tmp_path)
    with pytest.raises(UserError, match=r"q_proj.*is \[3, 32\], not \[3, 48\]"):
        load_adapter(lively_model("qwen2", hidden_size=48, num_attention_heads=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="IA3"):
        read_adapter_config(tmp_path)


def test_adapter_of_the_head_is_refused_for_what_it_is(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(lively_model("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="lm_head") as refusal:
        load_adapter(lively_model("llama"), tmp_path)
    assert "another model" not in str(refusal.value)  # it is for this very model


def test_an_adapter_of_a_gguf_file_opens_in_peft_and_finds_its_base(
    tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    export(ExportConfig(base_model=str(model), output_dir=str(tmp_path / "tiny"), quantize=["f16"]))
    output = tmp_path / "adapter"
    gguf = tmp_path / "tiny" / "tiny-f16.gguf"
    train(output, gguf, data_file, max_steps=1, cache_dir=str(tmp_path / "cache"), **LORA)
    assert "set base_model_name_or_path in adapter_config.json" in capsys.readouterr().out
    opened = AutoPeftModelForCausalLM.from_pretrained(output)
    base, record = find_base(
        MergeConfig(lora_model=str(output), output_dir="x", cache_dir=str(tmp_path / "cache")), output
    )
    assert record
    assert record.base_model == str(gguf)
    ours = load_model(base, torch.float32)
    load_adapter(ours, output)
    torch.testing.assert_close(logits_of(opened.float()), logits_of(ours), rtol=0, atol=1e-3)
