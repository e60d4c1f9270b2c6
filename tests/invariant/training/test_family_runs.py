"""Every dense family through the commands: a run killed after a checkpoint ends as one that was not, its adapter opens
in PEFT and PEFT's opens here, and the merged model answers as base and adapter do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from decoders import MODELS, NEWER
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import BOUND, LORA, assert_equal, assert_same_logits, lively, logits_of, metrics, train, weights
from transformers import AutoModelForCausalLM

from qingtune.adapters.peft_files import load_adapter
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig

# Transformers opens a Mistral that lists layer types, as the one of MODELS, as a Ministral.
FAMILIES = {name: MODELS[name] for name in ("qwen3", "llama", "phi3", *NEWER)} | {
    "mistral": ("mistral", {"sliding_window": 5})
}
STEPS, KILLED = 3, 2
COMMON: dict[str, Any] = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": STEPS, "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
}  # fmt: skip
DROPOUT = LORA | {"lora_dropout": 0.3}


def make(kind: str) -> Any:
    name, changes = FAMILIES[kind]
    return lively(make_model(name, **changes))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_killed_run_equals_whole_and_its_adapter_opens_and_merges(
    kind: str, method: str, tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = COMMON | (DROPOUT if method == "lora" else {})
    base, whole, killed = (tmp_path / name for name in ("base", "whole", "killed"))
    make(kind).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    assert train(whole, base, data_file, **settings)
    assert "general kernels" not in capsys.readouterr().err
    # All that a power cut leaves: the log went on after the checkpoint.
    shutil.copytree(whole / f"checkpoint-{KILLED}", killed / f"checkpoint-{KILLED}")
    for name in ("metrics.jsonl", "train_config.json"):
        shutil.copy(whole / name, killed)
    assert train(killed, base, data_file, **settings)
    assert f"checkpoint-{KILLED}" in capsys.readouterr().err
    assert metrics(killed) == metrics(whole)
    assert_equal(weights(killed), weights(whole))
    if method == "full":
        return
    model = make(kind)
    before = logits_of(model)
    load_adapter(model, whole)
    adapted = logits_of(model)
    assert float((adapted - before).abs().max()) > 0.1
    assert_same_logits(logits_of(PeftModel.from_pretrained(make(kind), str(whole))), adapted)
    merge(MergeConfig(lora_model=str(whole), output_dir=str(tmp_path / "merged")))
    told = capsys.readouterr().err
    assert "Stored in float32 and read back: nothing is rounded" in told
    assert "Greedy answers: 6 of 6 are the same." in told
    bound = 1e-4 if "qwen3.5" in kind else BOUND  # a recurrence carries roundings of the merge through the text
    assert_same_logits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), adapted, bound)


@pytest.mark.parametrize("kind", [*NEWER, "phi3", "mistral"])
def test_adapter_of_peft_opens_here(kind: str, tmp_path: Path) -> None:
    peft: Any = get_peft_model(
        make(kind), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    peft.save_pretrained(str(tmp_path))
    model = make(kind)
    before = logits_of(model)
    load_adapter(model, tmp_path)
    assert_same_logits(logits_of(model), logits_of(peft))
    assert float((logits_of(model) - before).abs().max()) > 0.1
