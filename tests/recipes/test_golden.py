"""Ten steps of each method on a tiny model give the losses they have always given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from qingtune.config_load import load_train_config
from qingtune.finetune import finetune

LORA = {"use_lora": True, "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 0.01},
    "lora": LORA,
    "qlora4": {**LORA, "use_qlora": True},
    "qlora8": {**LORA, "use_qlora": True, "quantization_bit": 8},
}
# Change these only with a change that is meant to alter the numbers, and say so where the change is told.
GOLDEN = {
    "full": [6.2041, 6.2619, 4.9294, 4.4714, 3.8437, 3.3391, 3.0127, 2.7019, 2.5242, 2.3253],
    "lora": [6.2041, 6.2619, 5.4268, 4.9822, 4.4595, 3.8891, 3.8188, 3.4906, 3.4162, 3.1084],
    "qlora4": [6.1490, 6.2452, 5.4986, 4.8437, 4.2048, 3.7199, 3.6425, 3.3674, 3.2067, 2.9490],
    "qlora8": [6.2034, 6.2624, 5.4181, 4.9885, 4.4637, 3.8767, 3.8300, 3.4937, 3.4156, 3.0955],
}


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_old(method: str, tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(place, "is_available", lambda: False)
    # Weights ten times larger than a fresh model's, so that attention and positions show in the loss.
    make_model("qwen2", initializer_range=0.2).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "data_path": str(data_file),
        "output_dir": str(tmp_path / "output"),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 1.0,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        **METHODS[method],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert finetune(load_train_config(str(tmp_path / "config.json"), {}).config)
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    losses = [round(json.loads(line)["loss"], 4) for line in lines]
    assert losses == pytest.approx(GOLDEN[method], abs=2e-3)
    assert losses[1:] == sorted(losses[1:], reverse=True)  # the first step of the warm-up has a learning rate of 0
