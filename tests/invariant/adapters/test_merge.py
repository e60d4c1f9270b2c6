"""A merged model gives the logits of base and adapter."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, lively_model, logits_of, move_adapters, save_model, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from qingtune.adapters.lora import add_lora, lora_layers, merge_lora
from qingtune.adapters.merge_stored import StoredAdapter
from qingtune.adapters.peft_files import read_adapter
from qingtune.cli import main
from qingtune.commands import merge as recipe
from qingtune.config.commands import MergeConfig
from qingtune.errors import UserError
from qingtune.export import merge_check
from qingtune.export.merge_check import measure_lost
from qingtune.kernels.device import Hardware
from qingtune.models import shards
from qingtune.models.quantize import quantize_model

Merge = Callable[..., None]
FP32 = Hardware(torch.device("cpu"), torch.float32, "")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gpt2", "mistral"])
def test_merged_logits_equal_adapter_logits(kind: str) -> None:
    model = lively_model(kind)
    base = logits_of(model)
    add_lora(model, None, r=3, alpha=5, dropout=0.5)
    move_adapters(model)
    adapted = logits_of(model)
    merge_lora(model)
    merged = logits_of(model)
    assert not lora_layers(model)
    assert float((adapted - base).abs().max()) > 0.5  # the adapter matters
    assert float((merged - adapted).abs().max()) < 1e-4  # of logits as large as 30: fp32 rounding


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_refused_untouched(bits: int) -> None:
    model = lively_model("qwen2")
    quantize_model(model, bits, torch.device("cpu"))
    add_lora(model, ["q_proj"], r=3, alpha=5, dropout=0.0)
    move_adapters(model)
    before = logits_of(model)
    with pytest.raises(TypeError, match=r"q_proj is quantised"):
        merge_lora(model)
    assert torch.equal(logits_of(model), before)


@pytest.fixture
def trained(tmp_path: Path, data_file: Path) -> Callable[[str], Path]:
    """A function that trains an adapter on a model of this kind, far enough to matter; returns its folder."""

    def train_adapter(kind: str, **settings: Any) -> Path:
        model = save_model(tmp_path / "model", kind)
        train(tmp_path / "adapter", model, data_file, max_steps=3, learning_rate=0.05, **LORA | settings)
        return tmp_path / "adapter"

    return train_adapter


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """A function that runs the recipe into `merged`."""

    def run_merge(adapter: Path, **settings: Any) -> None:
        recipe.merge(MergeConfig(lora_model=str(adapter), output_dir=str(tmp_path / "merged"), **settings))

    return run_merge


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("qwen2", {}), ("qwen2", {"use_qlora": True}), ("llama", {}), ("gpt2", {})],  # GPT-2's positions end at 256
    ids=["tied", "qlora", "untied", "short context"],
)
def test_recipe_writes_a_model_equal_to_base_and_adapter(
    kind: str, settings: dict[str, Any], trained: Callable[..., Path], merge: Merge, tmp_path: Path
) -> None:
    adapter = trained(kind, **settings)
    merge(adapter)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, str(adapter)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((adapted - before).abs().max()) > 0.1
    assert float((logits_of(merged) - adapted).abs().max()) < 1e-4

    tied = kind != "llama"
    assert merged.config.tie_word_embeddings is tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert json.loads((tmp_path / "merged" / "qingtune.json").read_text())["method"] == (
        "qlora" if settings else "lora"
    )


def test_wrong_merge_is_found_out_and_nothing_is_written(
    trained: Callable[..., Path], merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained("qwen2")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as context:
        context.setattr(StoredAdapter, "merged", lambda _, name, weight: weight)
        with pytest.raises(UserError, match="nothing was written"):
            merge(adapter)
    assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as context:
        context.setattr(merge_check, "MOST_MERGING_DIFFERENCE", -1.0)
        with pytest.raises(UserError, match="nothing was written"):
            merge(adapter)
    assert sorted(tmp_path.iterdir()) == before
    merge(adapter)
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        merge(adapter)
    monkeypatch.setattr(merge_check, "MOST_MERGING_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match="nothing was written"):
        merge(adapter, overwrite_output_dir=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == weights  # the earlier merge is still there


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_merge_ended_by_a_signal_leaves_nothing(
    name: str, trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained("qwen2")
    before = sorted(tmp_path.iterdir())
    staged: list[Path] = []

    def interrupted(folder: Path, *_: object) -> None:
        staged.append(folder)
        signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(recipe, "check_rounded_once", interrupted)
    code = main(["merge", "--lora_model", str(adapter), "--output_dir", str(tmp_path / "merged")])
    assert (code, len(staged)) == (128 + signal.Signals[name], 1)
    assert sorted(tmp_path.iterdir()) == before


def test_other_base_is_refused(trained: Callable[..., Path], merge: Merge, tmp_path: Path) -> None:
    adapter = trained("qwen2")
    other = lively_model("qwen2", seed=7)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="weights other than"):
        merge(adapter)
    assert not (tmp_path / "merged").exists()


def test_base_and_adapter_are_no_places_for_the_result(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained("qwen2")
    for place in (tmp_path / "model", adapter, tmp_path / "model" / ".." / "model"):
        with pytest.raises(UserError, match="output_dir contains"):
            recipe.merge(MergeConfig(lora_model=str(adapter), output_dir=str(place), overwrite_output_dir=True))
    assert (tmp_path / "model" / "config.json").exists()
    assert (adapter / "adapter_config.json").exists()


def test_sharded_base_in_16_bits_keeps_its_files(trained: Callable[..., Path], merge: Merge, tmp_path: Path) -> None:
    adapter = trained("llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sharded = tmp_path / "sharded"
    base.to(torch.bfloat16).save_pretrained(sharded, max_shard_size="20KB")
    make_tokenizer().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    merge(adapter, base_model=str(sharded), allow_other_base=True)
    merged = tmp_path / "merged"
    for path in sharded.glob("*.safetensors*"):
        assert (merged / path.name).stat().st_size == path.stat().st_size
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32), str(adapter))
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert found.dtype == torch.bfloat16
    rounded = wanted.merge_and_unload().to(torch.bfloat16).state_dict()
    assert rounded.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, rounded[name], rtol=2**-7, atol=0)  # fp32 sums may round the other way


def test_values_too_large_for_the_dtype_are_told(trained: Callable[..., Path], merge: Merge, tmp_path: Path) -> None:
    adapter = trained("qwen2")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 3000 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").half().save_pretrained(half)
    make_tokenizer().save_pretrained(half)
    for settings in ({}, {"save_dtype": "float16"}):
        with pytest.raises(UserError, match=r"proj\.weight contains .* float16 ends at 65504\. .*--save_dtype"):
            merge(adapter, base_model=str(half), allow_other_base=True, **settings)
        assert not (tmp_path / "merged").exists()


def test_prompts_and_answers_are_counted(
    trained: Callable[..., Path], merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(trained("qwen2"))
    told = capsys.readouterr().err
    assert "Greedy answers: 6 of 6 are the same." in told
    steps = ("Merging: 0.00 GB of weights, written and read back ...", "Comparing the merged model's", "Stored in")
    assert sorted(steps, key=told.index) == list(steps)


# --- Rounding --------------------------------------------------------------------------------------------------------

TOLD = re.compile(
    r"Merged in fp32, .* equals base \+ adapter: over [\d,]+ places the logits differ by (\S+) at most.*\n"
    r"Stored in bfloat16, .* the merged one rounded once\. That alone moves logits by (\S+) at most"
)


def in_16_bits(model: Path, folder: Path, **how: Any) -> Path:
    """A model's copy in bfloat16."""
    AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(folder, **how)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"], ids=["a tensor at a time", "in whole"])
def test_what_rounds_is_told_apart_from_merging(
    kind: str, trained: Callable[..., Path], merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(kind)
    half = in_16_bits(tmp_path / "model", tmp_path / "half")
    if kind == "gpt2":  # in whose files on hubs the names lack their first part
        tensors = load_file(half / "model.safetensors")
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(short, half / "model.safetensors", metadata={"format": "pt"})
    base = {"base_model": str(half), "allow_other_base": True}
    merge(adapter, **base)
    told = TOLD.search(capsys.readouterr().err)
    assert told
    merging, rounding = map(float, told.groups())
    assert 0 < merging < 1e-3 < rounding

    merge(adapter, **base, save_dtype="float32", overwrite_output_dir=True)
    told = capsys.readouterr().err
    assert "Stored in float32 and read back: nothing is rounded" in told
    assert "Greedy answers: 6 of 6 are the same." in told
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert found.dtype == torch.float32
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    adapted = logits_of(PeftModel.from_pretrained(wanted, str(adapter)))
    assert float((logits_of(found) - adapted).abs().max()) < 1e-3 * float(adapted.std())


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_dtype_asked_for_is_stored_and_said(
    name: str, dtype: torch.dtype, trained: Callable[..., Path], merge: Merge, tmp_path: Path
) -> None:
    adapter = trained("qwen2", modules_to_save="embed_tokens")  # so that head and embedding part
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    base.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    merge(adapter, save_dtype=name)
    merged = tmp_path / "merged"
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == name
    files = sorted(merged.glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    found = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert found.dtype == dtype
    wanted = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().to(dtype).state_dict()
    assert wanted.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2**-7, atol=1e-6)


def test_a_weight_that_is_not_the_merged_one_rounded_is_found_out(
    trained: Callable[..., Path], merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained("qwen2")
    base = {"base_model": str(in_16_bits(tmp_path / "model", tmp_path / "half")), "allow_other_base": True}
    kept = shards.rounded

    def one_bit_off(name: str, tensor: torch.Tensor, *more: Any) -> torch.Tensor:
        after = kept(name, tensor, *more)
        if name == "model.layers.1.mlp.up_proj.weight":
            after.view(torch.int16)[0, 0] ^= 1
        return after

    monkeypatch.setattr(shards, "rounded", one_bit_off)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight differs from the merged weight; nothing was written"
    ):
        merge(adapter, **base)
    assert not (tmp_path / "merged").exists()


def test_4_bits_and_a_dtype_contradict_each_other(trained: Callable[..., Path], merge: Merge) -> None:
    with pytest.raises(UserError, match="save_in_4bit and save_dtype are both given"):
        merge(trained("qwen2"), save_in_4bit=True, save_dtype="float32")


def test_check_sees_a_single_wrong_weight(trained: Callable[..., Path], tmp_path: Path) -> None:
    adapter = read_adapter(trained("qwen3"))
    base, changed = tmp_path / "model", tmp_path / "changed"
    changed.mkdir()

    def all_but_one(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight if name == "model.layers.1.mlp.up_proj.weight" else adapter.merged(name, weight)

    places: list[float] = []
    for change in (adapter.merged, all_but_one):
        shards.copy_changed(base, changed, adapter.names, change)
        shutil.copyfile(base / "config.json", changed / "config.json")
        prompts = [[5, 6, 7, 8], [9] * 30]
        found = measure_lost(base, adapter, changed, prompts, [], frozenset({2}), FP32, rounded=False).result
        places.append(found.mean / found.spread)
    assert places[0] < 1e-5
    assert places[1] > 1e-2
