"""The text of a multimodal checkpoint: trained, answered, adapted and merged under the checkpoint's own names, and the
rest of the checkpoint left as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from decoders import apart as gradients_apart
from decoders import batches, decoded, reference
from multimodal import GENERAL, KINDS, answered, apart, logits_of, made, opened, under_other_names
from safetensors.torch import load_file
from tiny_runs import LORA, QLORA4, QLORA8, train

from qingtune.adapters.peft_files import load_adapter
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig
from qingtune.errors import UserError
from qingtune.models.find import stored_numbers
from qingtune.models.load import check_architecture, load_model
from qingtune.models.multimodal import multimodal_name
from qingtune.planning.blueprint import read_blueprint

TRAINED = [
    *((kind, LORA) for kind in ("qwen3.5", "qwen3.5 moe", "gemma 3", "ministral", "qwen3-vl", "llava", "gemma 4")),
    ("gemma 3", QLORA4),
    ("ministral", QLORA8),
    ("qwen2.5-vl", QLORA4),
]


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_its_text_is_answered(kind: str, tied: bool, tmp_path: Path) -> None:
    model = made(kind, tmp_path, tied=tied)
    wanted = logits_of(model)
    assert apart(answered(kind, tmp_path), wanted) < 1e-4
    assert apart(answered(kind, under_other_names(tmp_path)), wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_multimodal_class_answer_and_merge(kind: str, tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    before = logits_of(made(kind, base))
    wanted = adapter_of(opened(kind, base), adapter)
    assert apart(before, wanted) > 1e-2
    assert apart(answered(kind, base, adapter), wanted) < 1e-4
    merge(MergeConfig(base_model=str(base), lora_model=str(adapter), output_dir=str(merged)))
    assert apart(logits_of(opened(kind, merged)), wanted) < 1e-4
    assert apart(answered(kind, merged), wanted) < 1e-4
    one, two = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert one.keys() == two.keys()
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}
    assert changed
    assert not any(part in name for name in changed for part in ("vis", "projector"))


def test_adapters_of_the_class_of_text_answer_and_merge(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "model", tmp_path / "adapter", tmp_path / "merged"
    made("qwen3.5", base)
    wanted = adapter_of(load_model(base, torch.float32), adapter)
    assert any("model.layers." in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert apart(answered("qwen3.5", base, adapter), wanted) < 1e-4
    merge(MergeConfig(base_model=str(base), lora_model=str(adapter), output_dir=str(merged), save_dtype="float32"))
    assert apart(logits_of(opened("qwen3.5", merged)), wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path)
    batch, whole = batches()["many samples"], opened(kind, tmp_path)
    whole.set_attn_implementation("eager")
    wanted, gradients = reference(whole, batch)
    trained = reference if kind in GENERAL else decoded
    loss, found = trained(load_model(tmp_path, torch.float32).eval(), batch)
    assert loss == pytest.approx(wanted, rel=1e-5)
    found = {multimodal_name(name): gradient for name, gradient in found.items()}
    assert gradients_apart(found, gradients) < 1e-4


@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_what_is_trained_here_opens_in_peft_on_the_multimodal_class(
    kind: str, method: dict[str, Any], tmp_path: Path, data_file: Path
) -> None:
    base, adapter = tmp_path / "model", tmp_path / "adapter"
    made(kind, base)
    train(adapter, base, data_file, max_steps=2, learning_rate=0.05, **method)
    model = opened(kind, base)
    before = logits_of(model)
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert not any("lora" in name and "language_model" not in name for name, _ in adapted.named_modules())
    found = logits_of(adapted)
    assert apart(found, before) > 1e-3
    assert apart(answered(kind, base, adapter), found) < 1e-4
    ours = load_model(base, torch.float32)
    load_adapter(ours, adapter)
    assert apart(logits_of(ours.eval()), found) < 1e-4
    if kind == "qwen3.5" and method is LORA:  # as docs/training.md says
        text = load_model(base, torch.float32)
        names = {"model.language_model.": "model."}
        assert apart(logits_of(peft.PeftModel.from_pretrained(text, adapter, key_mapping=names).eval()), found) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_its_text_alone_is_planned_for(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path)
    text, plan = load_model(tmp_path, torch.float32), read_blueprint(tmp_path)
    numbers = sum(parameter.numel() for parameter in text.parameters())
    assert plan.parameters == numbers
    assert stored_numbers(tmp_path) - numbers <= 2  # Gemma 4 stores a scalar for each layer that is no parameter
    assert plan.notices == ("Only the language part of this model is loaded and counted.",)


def test_a_head_that_is_stored_is_not_tied_because_the_class_takes_that_for_granted(tmp_path: Path) -> None:
    wanted = logits_of(made("mistral small", tmp_path, tied=False))
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for said in (None, True):  # as on the hub, and as Transformers writes that again
        content.pop("tie_word_embeddings", None)
        path.write_text(json.dumps(content | ({} if said is None else {"tie_word_embeddings": said})))
        assert apart(answered("mistral small", tmp_path), wanted) < 1e-4


def test_multimodal_models_whose_text_cannot_be_loaded_alone_are_refused_by_name(tmp_path: Path) -> None:
    for kind in ("gemma3n", "qwen3_vl_moe"):
        with pytest.raises(UserError, match=f'"{kind}" is multimodal'):
            check_architecture({"model_type": kind}, "config.json")
