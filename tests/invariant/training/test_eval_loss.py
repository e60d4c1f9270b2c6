"""The last eval_loss of a training is the loss that `evaluate` finds of its result on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, THINKING_TEMPLATE, instruction_rows, make_tokenizer, write_jsonl
from tiny_runs import LORA, QLORA8, metrics, save_model, train

from qingtune.answering import speaker
from qingtune.commands.evaluate import evaluate
from qingtune.config.commands import EvaluateConfig
from qingtune.kernels.device import Hardware

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
PLAIN: list[dict[str, Any]] = list(instruction_rows(5))
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"{row['instruction']} {row['input']}"},
            {"role": "assistant", "content": f"<think>Bread, {number}?</think>\n\n{row['output']}"},
            *({"role": role, "content": "And tea? 🫖"} for role in ("user", "assistant") if number % 2),
        ]
    }
    for number, row in enumerate(PLAIN)
]
# Apart at most: training rounds activations to 8 bits a token, evaluation 32 numbers at a time, and the merged ones.
# Seen: 0.006 to 0.012, where the loss falls by 0.47.
BIT8 = 0.02
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "lora, ChatML": ("qwen2", CHATML, LORA),
    "lora, thinking, a system prompt": ("qwen3", THINKING_TEMPLATE, {**LORA, "system_prompt": "You sell bread."}),
    "full, a default system prompt": ("llama", DEFAULT_SYSTEM, {"learning_rate": 0.002}),
    "lora, no template": ("gpt2", None, LORA),
    "qlora of 8 bits": ("qwen2", CHATML, QLORA8),
}


@pytest.mark.parametrize(("kind", "template", "settings"), CASES.values(), ids=CASES)
def test_eval_loss_is_the_loss_of_evaluate(
    kind: str, template: str | None, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32 = Hardware(torch.device("cpu"), torch.float32, "fp32")
    monkeypatch.setattr(speaker, "choose_hardware", lambda: fp32)
    model = save_model(tmp_path / "model", kind)
    make_tokenizer(template).save_pretrained(model)
    if template is None:
        (model / "chat_template.jinja").unlink()
    rows = CHATS if template else PLAIN
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    batches = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}  # of 5 rows
    output = tmp_path / "output"
    assert train(output, model, data, eval_data_path=str(data), num_train_epochs=1, **batches, **settings)
    evaluated = [line["eval_loss"] for line in metrics(output) if "eval_loss" in line]
    assert evaluated[-1] != pytest.approx(evaluated[0], abs=0.01)

    result = {"lora_model": str(output)} if "use_lora" in settings else {"base_model": str(output)}
    bits = {"load_in_8bit": True} if settings.get("use_qlora") else {}
    evaluate(EvaluateConfig(data=str(data), output_dir=str(tmp_path / "out"), skip_generation=True, **result, **bits))
    content: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    loss = content["metrics"]["loss"]
    assert loss["rows"] == len(rows)
    assert loss["after"]["value"] == pytest.approx(evaluated[-1], abs=BIT8 if bits else 1e-5)
