"""On an NVIDIA GPU: the same numbers as on the CPU, and every method runs in bf16. Left out where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def losses(
    run: Callable[..., CompletedProcess[str]], model: Path, data: Path, output: Path, *flags: str, **env: str
) -> list[float]:
    """The losses of four steps."""
    common = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    common += ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    result = run("fine_tune_qwen.py", *common, *flags, **env)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("flags", [[], ["--use_lora"]], ids=["full", "lora"])
def test_fp32_losses_are_those_of_the_cpu(
    run: Callable[..., CompletedProcess[str]],
    tiny: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    flags: list[str],
) -> None:
    exact = [*flags, "--bf16", "false", "--fp16", "false"]
    on_gpu = losses(run, tiny(), data_file, tmp_path / "gpu", *exact)
    on_cpu = losses(run, tiny(), data_file, tmp_path / "cpu", *exact, CUDA_VISIBLE_DEVICES="")
    assert on_gpu == pytest.approx(on_cpu, abs=2e-3)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_lora"],
        ["--use_lora", "--fp16"],
        ["--use_qlora"],
        ["--use_qlora", "--quantization_bit", "8"],
        ["--use_lora", "--gradient_checkpointing"],
        ["--use_lora", "--optim", "paged_adamw_8bit"],
    ],
    ids=lambda flags: " ".join(flags).replace("--", "") or "full",
)
def test_every_method_lowers_the_loss(
    run: Callable[..., CompletedProcess[str]],
    tiny: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    flags: list[str],
) -> None:
    seen = losses(run, tiny(), data_file, tmp_path / "out", *flags)
    assert seen[-1] < seen[0]


def test_adapter_answers_in_four_bits(
    run: Callable[..., CompletedProcess[str]], tiny: Callable[..., Path], data_file: Path, tmp_path: Path
) -> None:
    losses(run, tiny(), data_file, tmp_path / "out", "--use_qlora")
    result = run("inference_lora.py", "--lora_model", tmp_path / "out", "--load_in_4bit", "--prompt", "hi")
    assert result.returncode == 0, result.stderr
