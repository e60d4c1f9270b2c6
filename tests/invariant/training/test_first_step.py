"""The losses that a run reports are those of an independent computation with Transformers (and PEFT) alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, write_jsonl
from tiny_runs import LORA, METHODS, metrics, save_model, train
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def conversations(count: int, first: int = 0) -> list[dict[str, Any]]:
    """One turn or two, with and without a system message, short and long answers."""
    rows: list[dict[str, Any]] = []
    for number in range(first, first + count):
        turns = [("system", "Be brief. 请简短。")] if number % 2 else []
        turns += [
            ("user", f"{TEXTS[number % 5]} {number}"),
            ("assistant", f"{TEXTS[(number + 1) % 5]} " * (number % 4 + 1)),
        ]
        if number % 3 == 0:
            turns += [("user", "再来一条"), ("assistant", TEXTS[4])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def plain_mean_loss(model: Any, folder: Path, rows: Sequence[dict[str, Any]]) -> float:
    """One padded batch in fp32. Trained is what the rendered text holds between an assistant's header and its end."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    batch = tokenizer(
        texts, add_special_tokens=False, padding=True, return_offsets_mapping=True, return_tensors="pt"
    )  # fmt: skip
    labels = torch.full_like(batch["input_ids"], -100)
    for row, text in enumerate(texts):
        spans = [match.span(1) for match in ANSWER.finditer(text)]
        for place, (start, end) in enumerate(batch["offset_mapping"][row].tolist()):
            if end > start and any(first <= start and end <= last for first, last in spans):
                labels[row, place] = batch["input_ids"][row, place]
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def result_of(base: Path, output: Path) -> Any:
    """The trained model as Transformers and PEFT open it."""
    from peft import PeftModel

    if (output / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output))
    return AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("full", "qwen2"),
        ("lora", "qwen2"),
        ("lora", "qwen3"),
        ("full", "llama"),
        ("full", "gpt2"),
        ("lora", "gpt2"),
        ("lora", "mistral"),
        ("lora", "olmo2"),
    ],
)
def test_reported_losses_equal_plain_transformers(
    method: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_rows, eval_rows = conversations(7), conversations(5, first=50)
    model = save_model(tmp_path / "model", kind)
    output = tmp_path / "output"
    train(
        output,
        model,
        write_jsonl(tmp_path / "train.jsonl", train_rows),
        eval_data_path=str(write_jsonl(tmp_path / "eval.jsonl", eval_rows)),
        per_device_eval_batch_size=2,  # 2 + 2 + 1 samples of different lengths: a mean of means would be off
        max_steps=1,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        **METHODS[method],
    )
    before, step, after = metrics(output)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert step["loss"] == pytest.approx(plain_mean_loss(base, model, train_rows), abs=1e-4)
    assert before["eval_loss"] == pytest.approx(plain_mean_loss(base, model, eval_rows), abs=1e-4)
    trained = result_of(model, output)
    assert after["eval_loss"] == pytest.approx(plain_mean_loss(trained, model, eval_rows), abs=1e-4)
    assert abs(after["eval_loss"] - before["eval_loss"]) > 5e-3  # so that the line above compares something
    reason = f'Using general kernels (slower, more memory): "{kind}" is not one of the architectures'
    assert (reason in capsys.readouterr().err) is (kind in ("gpt2", "olmo2"))


def test_first_step_of_adapter_is_that_of_base(tmp_path: Path, data_file: Path) -> None:
    model = save_model(tmp_path / "model")
    for rank in (2, 8):
        train(tmp_path / f"rank{rank}", model, data_file, max_steps=1, **LORA | {"lora_r": rank, "lora_dropout": 0.5})
    train(tmp_path / "full", model, data_file, max_steps=1)
    first = [metrics(tmp_path / name)[0]["loss"] for name in ("rank2", "rank8", "full")]
    assert first[:2] == pytest.approx([first[2]] * 2, abs=1e-6)


def test_one_by_one_is_told(tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "output", save_model(tmp_path / "model", "vaultgemma"), data_file, max_steps=1, **LORA)
    assert "one by one: its logits are more than a product with its head." in capsys.readouterr().err
    assert json.loads((tmp_path / "output" / "qingtune.json").read_text())["results"]["steps"] == 1
