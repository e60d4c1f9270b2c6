"""A model merged into 4 bits holds NF4 of the merged weights, for Transformers as for us; wrong ones are found out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from tiny_runs import LORA, lively_model, logits_of, train
from transformers import AutoModelForCausalLM

from qingtune.adapters.merge_stored import StoredAdapter
from qingtune.adapters.peft_files import read_adapter
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.load import load_decoder
from qingtune.commands import merge as recipe
from qingtune.config.commands import MergeConfig
from qingtune.errors import UserError
from qingtune.export import merge_nf4
from qingtune.export.merge_check import LogitDifference, Lost
from qingtune.kernels.device import Hardware
from qingtune.kernels.linear import NF4Linear
from qingtune.models import shards
from qingtune.models.load import load_model
from qingtune.models.stored_weights import StoredWeights

Trained = Callable[..., Path]
FP32 = Hardware(torch.device("cpu"), torch.float32, "")


@pytest.fixture
def trained(tmp_path: Path, data_file: Path) -> Trained:
    """A function that trains an adapter on a model of this kind, far enough to matter; returns its folder."""

    def train_adapter(kind: str, **settings: Any) -> Path:
        # Rows of whole blocks, as bitsandbytes itself reads others wrongly on a CPU.
        wide = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}
        changes = {} if kind == "gpt2" else wide | ({"head_dim": 16} if kind == "qwen3" else {})
        lively_model(kind, **changes).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        train(tmp_path / "adapter", tmp_path / "model", data_file, max_steps=3, learning_rate=0.05, **LORA | settings)
        return tmp_path / "adapter"

    return train_adapter


def merge(adapter: Path, **settings: Any) -> Path:
    merged = adapter.parent / "merged"
    recipe.merge(MergeConfig(lora_model=str(adapter), output_dir=str(merged), save_in_4bit=True, **settings))
    return merged


def transformers_weights(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model as Transformers and bitsandbytes load it, and its weights, those in 4 bits unpacked by the library."""
    import bitsandbytes
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: tensor.data for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = dequantize_bnb_weight(module.weight)
    return model, weights


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_transformers_reads_nf4_of_the_merged_weights(kind: str, trained: Trained) -> None:
    folder = trained(kind)
    adapter, base = read_adapter(folder), StoredWeights(folder.parent / "model")
    merged = merge(folder)
    model, weights = transformers_weights(merged)
    ours = StoredWeights(merged)
    assert set(ours.packed) == {name for name in base.shapes if "_proj.weight" in name}
    for name, shape in base.shapes.items():
        wanted = adapter.merged(name, base.read(name))
        if name in ours.packed:
            wanted = NF4Linear.restore((shape[0], shape[1]), NF4Linear.pack(wanted), None).dequantize(torch.float32)
        assert torch.equal(weights[name], wanted), name
        assert torch.equal(ours.read(name), wanted), name
    dense = load_model(merged, torch.float32)
    decoder = load_decoder(merged, None, None, FP32, None, 1)
    assert isinstance(decoder, CachedDecoder)
    with torch.inference_mode():  # not in evaluation, in which bitsandbytes may round to bf16 on a CPU
        theirs = model.train()(input_ids=torch.arange(3, 60)[None], use_cache=False).logits[0]
    assert float((logits_of(dense)[0] - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    # In C the upper 24 bits of fp32 weights are multiplied.
    assert float((decoder.start(list(range(3, 60))) - theirs[-1]).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_what_is_lost_is_told(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "SAMPLE_TOKENS", 4096)  # the tiny tokenizer knows hardly more than bytes
    folder = merge(trained("qwen2"))
    told = capsys.readouterr().err
    found = re.search(r"14 weights are in 4 bits, off by (\d+\.\d)% on average and (\d+\.\d)% at most", told)
    assert found
    assert 5 < float(found[1]) < float(found[2]) < 15
    shares = re.search(r"at most, (\S+) of their spread .*on average, (\d+\.\d)% of their spread;", told, re.DOTALL)
    assert shares
    assert float(shares[1]) < 1e-3
    assert 0.1 < float(shares[2]) < 60
    assert re.search(r"Greedy answers: \d of 6 .* 6 bundled samples: \d+\.\d{4} -> \d+\.\d{4}\.", told)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head"
    ]


def test_a_changed_embedding_leaves_the_head_as_it_was(trained: Trained) -> None:
    adapter = trained("qwen2", modules_to_save="embed_tokens")
    merged = merge(adapter)
    _, weights = transformers_weights(merged)
    assert torch.equal(weights["lm_head.weight"], StoredWeights(adapter.parent / "model").read(recipe.EMBEDDING))
    assert not torch.equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"])


def test_large_models_come_in_several_files(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained("llama")
    whole = load_file(merge(adapter) / "model.safetensors")
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    merged = merge(adapter, overwrite_output_dir=True)
    files = sorted(merged.glob("*.safetensors"))
    assert len(files) > 2
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        parts |= load_file(file)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((merged / shards.INDEX).read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert torch.equal(transformers_weights(merged)[1]["lm_head.weight"], whole["lm_head.weight"])


def unmerged(_: StoredAdapter, name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


def pack_wrongly(weight: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return pack(weight.flip(0), dtype)


pack = NF4Linear.pack
FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "adapter left out": (StoredAdapter, "merged", unmerged, "merged in fp32, the logits differ"),
    "rows turned round": (NF4Linear, "pack", staticmethod(pack_wrongly), "differs from the merged weight"),
    "a norm changed": (
        merge_nf4,
        "rounded",
        lambda name, tensor, dtype, _: tensor.to(dtype) * (1.01 if "norm" in name else 1),
        r"norm\.weight differs from the merged weight",
    ),
    "beyond the bound": (merge_nf4, "MOST_MEAN_DIFFERENCE", 1e-6, "in 4 bits the model differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_merge_is_found_out_and_leaves_nothing(
    fault: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained("qwen2")
    before = sorted(tmp_path.iterdir())
    owner, name, wrong, told = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(UserError, match=told) as error:
        merge(adapter)
    assert "nothing was written" in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_layers_that_are_stored_turned_round_are_refused(trained: Trained, tmp_path: Path) -> None:
    adapter = trained("gpt2")
    with pytest.raises(UserError, match=r"transposed.*Remove --save_in_4bit"):
        merge(adapter)
    assert not (tmp_path / "merged").exists()


def test_values_that_are_no_numbers_are_refused(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained("qwen2")
    monkeypatch.setattr(StoredAdapter, "merged", lambda _, name, weight: weight * float("inf"))
    with pytest.raises(UserError, match="values that are not numbers"):
        merge(adapter)


@pytest.mark.parametrize(("merging", "result", "passes"), [(9e-4, 0.4, True), (2e-3, 0.4, False), (9e-4, 0.6, False)])
def test_bounds_are_those_that_are_stated(merging: float, result: float, passes: bool) -> None:
    lost = Lost(
        *(LogitDifference(10, share * 4, share * 4, 4.0, 0.5, 6, 3) for share in (merging, result)), 6, (2.0, 2.1)
    )
    if passes:
        assert "2.0000 -> 2.1000" in merge_nf4.judge(lost)
    else:
        with pytest.raises(UserError, match="nothing was written"):
            merge_nf4.judge(lost)
