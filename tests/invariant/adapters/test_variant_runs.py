"""Runs of every kind of adapter: the result opens in PEFT and merges, and the split of a window changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_runs import LORA, assert_same_logits, lively_model, logits_of, metrics, save_model, train

from qingtune.adapters.peft_files import load_adapter, read_adapter
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig

RUNS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora in 16 bits": {"use_dora": True, "bf16": True},
    "rslora": {"use_rslora": True, "lora_r": 9},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns and layers": {
        "rank_pattern": "q_proj=2,up_proj=5",
        "alpha_pattern": {"q_proj": 1},
        "layers_to_transform": "1",
    },
    "head and norm, lora+": {"modules_to_save": "lm_head,model.norm", "loraplus_lr_ratio": 4},
    "everything": {"use_dora": True, "use_rslora": True, "init_lora_weights": "olora"}
    | {"modules_to_save": "embed_tokens", "loraplus_lr_ratio": 4, "lora_dropout": 0.1, "bf16": True},
    "dora on 4 bits": {"use_qlora": True, "use_dora": True},
    "head on 8 bits": {"bf16": True, "use_qlora": True, "quantization_bit": 8, "modules_to_save": "lm_head"},
}


@pytest.mark.parametrize("name", RUNS)
def test_result_of_a_run_opens_in_peft(
    name: str, tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "model")
    train(tmp_path / "out", base, data_file, max_steps=3, **LORA | RUNS[name])
    told = capsys.readouterr().err
    assert ("Using general kernels (slower, more memory): DoRA with lora_dropout" in told) == (name == "everything")
    assert ("Using general kernels" in told) == (name == "everything")  # all else is computed by ours
    assert ("The head and the embedding of this model share one matrix" in told) == ("modules_to_save" in RUNS[name])
    assert ("LoRA+: B matrices use 4 times" in told) == ("loraplus_lr_ratio" in RUNS[name])
    opened = PeftModel.from_pretrained(type(lively_model("qwen2")).from_pretrained(base), str(tmp_path / "out"))
    model = lively_model("qwen2")
    load_adapter(model, tmp_path / "out")
    assert_same_logits(logits_of(opened), logits_of(model))
    assert float((logits_of(model) - logits_of(lively_model("qwen2"))).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["dora", "head and norm, lora+", "everything"])
def test_a_run_s_result_merges(name: str, tmp_path: Path, data_file: Path) -> None:
    base = save_model(tmp_path / "model")
    train(tmp_path / "out", base, data_file, max_steps=2, **LORA | RUNS[name])
    merge(MergeConfig(lora_model=str(tmp_path / "out"), output_dir=str(tmp_path / "merged")))
    model = lively_model("qwen2")
    load_adapter(model, tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same_logits(logits_of(merged), logits_of(model))
    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert tied is merged.config.tie_word_embeddings is ("modules_to_save" not in RUNS[name])


@pytest.mark.parametrize("name", ["dora", "pissa", "head and norm, lora+"])
def test_split_of_a_window_changes_nothing(name: str, tmp_path: Path, data_file: Path) -> None:
    base = save_model(tmp_path / "model")
    for batch, accumulation in ((4, 1), (1, 4)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        settings = LORA | RUNS[name] | split | {"optim": "sgd", "learning_rate": 0.05}
        train(tmp_path / f"{batch}", base, data_file, **settings)
    one, two = ([line["loss"] for line in metrics(tmp_path / folder)] for folder in ("1", "4"))
    assert one == pytest.approx(two, rel=1e-5)


def test_lora_plus_multiplies_what_b_learns(tmp_path: Path, data_file: Path) -> None:
    """After one step of gradient descent, B, zero before, is as many times as large; the log has the base rate."""
    base = save_model(tmp_path / "model")
    common = LORA | {"max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0}
    results = {}
    for ratio in (1, 8):
        train(tmp_path / f"{ratio}", base, data_file, **common, loraplus_lr_ratio=ratio)
        results[ratio] = read_adapter(tmp_path / f"{ratio}").layers
        assert [line["learning_rate"] for line in metrics(tmp_path / f"{ratio}")] == [0.01]
    for name, low in results[1].items():
        torch.testing.assert_close(low.b * 8, results[8][name].b)
        assert torch.equal(low.a, results[8][name].a)
