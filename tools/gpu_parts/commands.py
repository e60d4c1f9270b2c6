"""The command as users type it, on a small model with a tokenizer, within this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from benchmarks import workload
from gpu_parts.scale import Scale
from qingtune.cli import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "store_xhs_sft_samples.jsonl"
LENGTH = 512  # tokens of a sample, at most


def model_folder(scale: Scale, layers: int | None = 2) -> Path:
    """The 0.5B shape with this many layers, None for all of them; two of a narrow one where this is rehearsed."""
    shape = workload.DEFAULT_SHAPE
    if scale.on_gpu:
        return workload.random_model(scale.scratch / f"model-{layers}", shape, layers)
    kind, sizes = workload.SHAPES[shape]
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    workload.SHAPES["narrow"] = (kind, {**sizes, **narrow, "vocab_size": 8192})
    return workload.random_model(scale.scratch / "model", "narrow", 2)


def train(scale: Scale, output: Path, *flags: str) -> tuple[list[float], str]:
    """Losses of a short LoRA run, and what it said.

    Raises:
        RuntimeError: the command failed.
    """
    settings = [
        "train", "--model_name_or_path", str(model_folder(scale)), "--data_path", str(DATA), "--use_lora",
        "--output_dir", str(output), "--lora_r", "8", "--per_device_train_batch_size", "8", "--logging_steps", "1",
        "--report_to", "none", "--learning_rate", "1e-3", "--max_seq_length", str(LENGTH), "--seed", "1",
    ]  # fmt: skip
    if not scale.on_gpu:
        settings += ["--bf16", "false"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main([*settings, *flags])
    if code:
        raise RuntimeError(f"train ended with {code}: {said.getvalue()[-600:]}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row], said.getvalue()
