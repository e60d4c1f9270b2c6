"""Adapters of a mixture's experts: LoRA's formula, files that PEFT reads and writes, merging, and quantised experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import OTHERS, make_mixture
from peft import LoraConfig, PeftModel, get_peft_model

from qingtune.adapters.expert_lora import expert_adapters, expert_shapes
from qingtune.adapters.lora import add_lora, merge_lora
from qingtune.adapters.merge_stored import MergedWeights
from qingtune.adapters.peft_files import load_adapter, read_adapter, save_adapter
from qingtune.adapters.variants import Variant
from qingtune.errors import UserError
from qingtune.files.weights_file import read_header
from qingtune.kernels.experts.modules import ExpertAdapter, QuantizedExperts
from qingtune.kernels.linear import QuantizedLinear
from qingtune.models.base import load_base
from qingtune.models.load import load_model
from qingtune.models.quantize import quantize_model

CPU = torch.device("cpu")
TOKENS = torch.arange(40).view(2, 20) * 7 % 320
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def fill(model: Any) -> None:
    """Give all adapters values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def adapted(kind: str = "Qwen3Moe", names: list[str] | None = None, **changes: Any) -> Any:
    model = make_mixture(kind)
    add_lora(model, names, 4, 8, 0.0, **changes)
    fill(model)
    return model


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_are_found_and_computed_as_transformers_does(kind: str) -> None:
    model = make_mixture(kind)
    before = logits(model)
    assert len(expert_shapes(model)) == 4
    adapters = add_lora(model, EXPERTS, 4, 8, 0.0)
    assert list(adapters) == list(expert_shapes(make_mixture(kind)))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_by_default_experts_have_adapters_too() -> None:
    adapters = add_lora(make_mixture(), None, 4, 8, 0.0)
    mine = {name: one for name, one in adapters.items() if isinstance(one, ExpertAdapter)}
    assert [name.rpartition("layers.0.")[2] for name in mine][:2] == [f"mlp.{name}" for name in EXPERTS]
    assert tuple(mine["model.layers.0.mlp.experts.gate_up_proj"].lora_A.shape) == (6, 4, 32)
    assert tuple(mine["model.layers.0.mlp.experts.gate_up_proj"].lora_B.shape) == (6, 48, 4)
    assert len(adapters) == 2 * (4 + 2)


@pytest.mark.parametrize(
    ("names", "matched"),
    [
        (["q_proj", "gate_proj", "up_proj", "down_proj"], ["self_attn.q_proj", *(f"mlp.{name}" for name in EXPERTS)]),
        (["down_proj"], ["mlp.experts.down_proj"]),
        (["gate_up_proj"], ["mlp.experts.gate_up_proj"]),
        (["layers.0.mlp.experts.down_proj"], ["mlp.experts.down_proj"]),
    ],
)
def test_the_names_of_dense_layers_reach_experts(names: list[str], matched: list[str]) -> None:
    found = add_lora(make_mixture(num_hidden_layers=1), names, 4, 8, 0.0)
    assert list(found) == [f"model.layers.0.{name}" for name in matched]


def test_gate_without_up_is_refused_as_an_expert_holds_both_in_one() -> None:
    with pytest.raises(UserError, match='"gate_proj" matches no linear layer'):
        add_lora(make_mixture(), ["q_proj", "gate_proj"], 4, 8, 0.0)


@pytest.mark.parametrize("variant", [Variant(use_dora=True), Variant(init_lora_weights="pissa")], ids=["dora", "pissa"])
def test_what_does_not_exist_for_experts_leaves_them_alone(variant: Variant) -> None:
    adapters = add_lora(make_mixture(), None, 4, 8, 0.0, variant=variant)
    assert len(adapters) == 8
    with pytest.raises(UserError, match="neither DoRA nor"):
        add_lora(make_mixture(), ["down_proj"], 4, 8, 0.0, variant=variant)


def test_the_addition_is_that_of_the_formula() -> None:
    model = adapted(names=EXPERTS)
    found, adapters = logits(model), expert_adapters(model)
    plain = make_mixture()
    for name, adapter in adapters.items():
        weight = plain.get_parameter(name)
        weight.data += adapter.scaling * (adapter.lora_B @ adapter.lora_A).detach()
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-5)
    merge_lora(model)
    assert not expert_adapters(model)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "names", "variant"),
    [
        ("Qwen3Moe", None, Variant()),
        ("Qwen3Moe", EXPERTS, Variant(use_rslora=True)),
        ("Qwen3Moe", ["experts.down_proj"], Variant()),
        ("Qwen3Moe", ["experts.gate_up_proj", "q_proj"], Variant()),
        ("Qwen3Moe", None, Variant(rank_pattern={"experts.down_proj": 2}, alpha_pattern={"gate_up_proj": 5})),
        ("Qwen3Moe", None, Variant(layers_to_transform=[1])),
        ("Qwen3_5MoeText", None, Variant()),
    ],
    ids=["all", "experts", "down", "gate-up", "patterns", "one-layer", "qwen3.5"],
)
def test_peft_reads_what_is_saved_here(tmp_path: Path, kind: str, names: list[str] | None, variant: Variant) -> None:
    model = adapted(kind, names, variant=variant)
    save_adapter(model, tmp_path, "base", 0.1)
    theirs = PeftModel.from_pretrained(make_mixture(kind), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    mine = make_mixture(kind)
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(logits(mine), logits(model))


def test_names_of_a_multimodal_model_are_read_back(tmp_path: Path) -> None:
    model = adapted("Qwen3_5MoeText")
    save_adapter(model, tmp_path, "base", 0.0, multimodal=True)
    names = read_header(tmp_path / "adapter_model.safetensors")[0]
    assert "base_model.model.model.language_model.layers.0.mlp.experts.base_layer.lora_A.weight" in names
    mine = make_mixture("Qwen3_5MoeText")
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(logits(mine), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
        {"target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"], "target_modules": []},
        {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
        {
            "target_parameters": ["gate_up_proj", "down_proj"],
            "target_modules": ["q_proj"],
            "rank_pattern": {"experts.down_proj": 3},
            "use_rslora": True,
        },
    ],
    ids=["both", "down", "full-name", "converted", "patterns"],
)
def test_what_peft_saves_is_read_here(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = get_peft_model(make_mixture(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    mine = make_mixture()
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_router_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_parameters=["mlp.gate.weight"], target_modules=[])
    get_peft_model(make_mixture(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"target_parameters of mlp\.gate\.weight, which is not supported"):
        load_adapter(make_mixture(), tmp_path)


@pytest.mark.parametrize("changes", [{"num_experts": 4}, {"hidden_size": 16}], ids=["experts", "hidden"])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_adapter(adapted(names=EXPERTS), tmp_path, "base", 0.0)
    with pytest.raises(UserError, match="the adapter does not fit"):
        load_adapter(make_mixture(**changes), tmp_path)


def test_a_rank_that_does_not_divide_the_rows_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(names=EXPERTS), tmp_path, "base", 0.0)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    with pytest.raises(UserError, match="are not a LoRA pair of rank 5 for each expert"):
        load_adapter(make_mixture(), tmp_path)


@pytest.mark.parametrize("joined", [True, False])
def test_stored_weights_are_merged_without_a_model(tmp_path: Path, joined: bool) -> None:
    """From a base whose files hold the experts joined, as those of Qwen3.5 do, or one by one, as those of Qwen3."""
    from safetensors.torch import save_file

    model, base = adapted(), make_mixture()
    save_adapter(model, tmp_path, "base", 0.0)
    folder = tmp_path / "base"
    folder.mkdir()
    if joined:
        save_file(dict(base.state_dict()), folder / "model.safetensors")
    else:
        base.save_pretrained(folder)
    merged = MergedWeights(folder, read_adapter(tmp_path))
    assert len(merged.changed) == 2 * (4 + (2 if joined else 6 * 3))
    if joined:
        name = "model.layers.0.mlp.experts.down_proj"
        torch.testing.assert_close(merged.expert(name, 4), merged.read(name)[4])
    merged.join_experts(base)
    for name in dict(base.named_parameters()):
        base.get_parameter(name).data = merged.read(name)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen3_5MoeText"])
def test_quantised_experts_are_the_dequantised_ones(kind: str, bits: int) -> None:
    model = make_mixture(kind)
    quantize_model(model, bits, CPU)
    plain = make_mixture(kind)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            for part in ("gate_up_proj", "down_proj"):
                weights = torch.stack([one.dequantize(torch.float32) for one in getattr(module, part)])
                before = plain.get_parameter(f"{name}.{part}")
                assert 0 < (before - weights).norm() / before.norm() < (0.2 if bits == 4 else 0.02)
                before.data = weights
        elif isinstance(module, QuantizedLinear) and ".experts." not in name:
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    add_lora(model, None, 4, 8, 0.0)
    add_lora(plain, None, 4, 8, 0.0)
    fill(model)
    fill(plain)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    grads = []
    for one in (model, plain):
        one(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad for name, p in one.named_parameters() if "lora_" in name])
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_experts_are_cached(tmp_path: Path, bits: int, reported: Callable[[], list[str]]) -> None:
    """Files hold experts one by one; the first load quantises, the second reads what was kept."""
    base = make_mixture()
    base.save_pretrained(tmp_path / "base")
    names = json.loads((tmp_path / "base" / "config.json").read_text())
    assert names["model_type"] == "qwen3_moe"
    loaded = [load_base(tmp_path / "base", torch.float32, bits, CPU, str(tmp_path / "cache")) for _ in range(2)]
    assert sum("Quantised and cached" in line for line in reported()) == 1
    quantize_model(base, bits, CPU)
    for model in loaded:
        assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 2
        torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_experts_that_are_stored_apart_are_joined_as_transformers_does(tmp_path: Path, kind: str) -> None:
    make_mixture(kind).save_pretrained(tmp_path)
    found = load_model(tmp_path, torch.float32).state_dict()
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
