"""A mixture of experts from files to files: trained, interrupted and resumed, answered, merged, opened by Transformers
and PEFT; from files with each expert's matrices apart, as Qwen3-MoE is published, and with all experts' together, as
Qwen3.5-MoE is."""

from __future__ import annotations

from pathlib import Path
from signal import SIGTERM
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import instruction_rows, make_tokenizer, write_jsonl
from mixtures import make_mixture
from safetensors.torch import save_file
from test_resume import COMMON, LORA, QLORA4, assert_same_run, raise_at_call
from tiny_runs import assert_same_logits, lively, logits_of, train

from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.packed import has_int4_kernels
from qingtune.answering.load import load_decoder
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig
from qingtune.files.weights_file import read_header
from qingtune.kernels.device import Hardware

FP32 = Hardware(torch.device("cpu"), torch.float32, "")
KINDS = ["Qwen3Moe", "Qwen3_5MoeText"]
ATTENTION = {"lora_target_modules": ["q_proj", "v_proj"]}
IDS = list(range(3, 40))


def save_mixture(folder: Path, kind: str) -> Path:
    model, file = lively(make_mixture(kind)), folder / "model.safetensors"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in read_header(file)[0]
    if kind != "Qwen3Moe":
        save_file(dict(model.state_dict()), file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("settings", [{}, LORA, QLORA4], ids=["full", "lora", "qlora4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_equals_one_that_was_not(
    kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_mixture(tmp_path / "model", kind)
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(18))
    assert train(tmp_path / "whole", model, data, **COMMON | settings)
    with monkeypatch.context() as context:
        raise_at_call(context, 7, [SIGTERM])
        assert not train(tmp_path / "stopped", model, data, **COMMON | settings)
    assert train(tmp_path / "stopped", model, data, **COMMON | settings)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("settings", [LORA, LORA | ATTENTION], ids=["experts", "attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_use_an_adapter_give_the_same_logits(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, adapter, merged = save_mixture(tmp_path / "model", kind), tmp_path / "adapter", tmp_path / "merged"
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(18))
    assert train(adapter, model, data, **settings, max_steps=4)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = logits_of(base)
    wanted = logits_of(peft.PeftModel.from_pretrained(base, str(adapter)))
    assert (wanted - before).abs().max() > 0.1
    merge(MergeConfig(lora_model=str(adapter), output_dir=str(merged)))
    assert read_header(merged / "model.safetensors")[0].keys() == read_header(model / "model.safetensors")[0].keys()
    opened = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert_same_logits(logits_of(opened), wanted, 1e-4)
    for folder, with_adapter in ((model, adapter), (merged, None)):
        decoder = load_decoder(folder, with_adapter, None, FP32, None, 1)
        assert isinstance(decoder, CachedDecoder)
        assert_same_logits(decoder.start(list(range(3, 60)))[None], wanted[0, -1:], 1e-4)


@pytest.mark.parametrize(
    "bits",
    [pytest.param(4, marks=pytest.mark.skipif(not has_int4_kernels(), reason="PyTorch has no such kernels here")), 8],
)
def test_quantised_answers_of_both_layouts_take_the_fast_kernels(bits: int, tmp_path: Path) -> None:
    for kind in KINDS:
        model = save_mixture(tmp_path / kind, kind)
        decoder = load_decoder(model, None, bits, FP32, None, 1)
        assert isinstance(decoder, CachedDecoder)
        assert decoder.start(IDS).isfinite().all()
