"""The folder of a run that never was, with everything in it that a page can show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from conftest import write_jsonl

from qingtune.runs.page.source import EVALUATION
from qingtune.runs.record import FACTS, METRICS, RECORD, SAMPLES, SETTINGS

HOSTILE = '<script>document.title = "taken"</script><img src="https://example.org/x.png">&amp; {{ 7 * 7 }}'
POST = (
    "🥖 蓝门面包房｜清晨七点的第一炉香气\n\n"
    "磨坊巷4号的蓝门，七点一到就开始冒热气～外壳咔嚓一声，里面软得像云朵 ☁️\n\n#面包 #早餐 #蓝门"
)
BASE = "Qwen/Qwen2.5-0.5B-Instruct"
STEPS = 240


def logged(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl, with some noise that is the same each time."""
    noise = math.sin(step * 12.9898) * 0.12
    return {
        "step": step,
        "epoch": step / 80,
        "loss": 1.4 + 1.2 * math.exp(-step / 60) + noise,
        "learning_rate": 2e-4 * min(1, step / 12) * (1 - step / (STEPS * 1.02)),
        "grad_norm": 0.8 + 0.5 * math.exp(-step / 40) + abs(noise),
        "tokens": 2900 + round(400 * noise),
        "trained_tokens": 1900,
        "seconds": 17.0 + 3 * noise,
        "peak_bytes": 2_400_000_000 + min(step, 40) * 5_000_000,
    }


def evaluated(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 80,
        "eval_loss": 1.55 + 0.9 * math.exp(-step / 70),
        "eval_tokens": 9000,
        "eval_seconds": 21.0,
    }


def summary_of(samples: int) -> dict[str, Any]:
    return {
        "rows": samples, "faults": 0, "samples": samples, "tokens": samples * 366, "trained_tokens": samples * 240,
        "too_long": 0, "untrained": 0, "truncated": 2, "split_conversations": 0,
        "lengths": {"p50": 350, "p90": 471, "p99": 560, "longest": 588},
        "histogram": [(24 * (i + 1), round(60 * math.exp(-((i - 14) ** 2) / 18))) for i in range(24)],
        "first_too_long": [],
    }  # fmt: skip


def write_run(folder: Path, *, finished: bool = True, extras: bool = True) -> Path:
    """Write the folder; `extras` are the files and results of other commands."""
    folder.mkdir(parents=True)
    settings = {
        "model_name_or_path": BASE, "use_lora": True, "lora_r": 64, "lora_alpha": 128.0, "learning_rate": 2e-4,
        "data_path": ["data/store_xhs_sft_samples.jsonl"], "eval_data_path": ["data/store_xhs_heldout.jsonl"],
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "seed": 42,
        "rank_pattern": {f"layers.{i}.mlp.up_proj": 8 for i in range(12)}, "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    lines = [evaluated(0)]
    for step in range(1, STEPS + 1):
        lines += [logged(step)] + [evaluated(step)] * (step % 40 == 0)
    lines[50] |= {"loss": None, "grad_norm": None, "not_finite": {"loss": "nan", "grad_norm": "nan"}}
    write_jsonl(folder / METRICS, lines)
    training = {
        "summary": summary_of(228), "formats": {"data/store_xhs_sft_samples.jsonl": "instruction"},
        "ignored_columns": {"data/store_xhs_sft_samples.jsonl": ["style", "shop"]}, "rows_read": 228, "faults": 1,
        "first_faults": ['data/store_xhs_sft_samples.jsonl:118: "output" is empty'],
    }  # fmt: skip
    held_out = {"summary": summary_of(30), "formats": {}, "ignored_columns": {}, "rows_read": 0, "faults": 0}
    facts = {
        "data": {
            "training": training, "evaluation": {**held_out, "first_faults": []}, "evaluated_and_trained": 0,
            "example": f"<|im_start|>user\n写一条笔记。<|im_end|>\n<|im_start|>assistant\n>>>{POST}<|im_end|><<<",
        },
        "machine": {
            "device": "CPU, 2 threads (no GPU that torch can use), bfloat16: the hardware supports it", "processes": 1,
            "system": "Linux-6.1-x86_64-with-glibc2.36", "python": "3.11.9", "processor": "AMD EPYC 9R14", "cores": 2,
            "memory_bytes": 25_000_000_000, "started": "2026-11-25T20:00:00+00:00",
        },
        "versions": {"qingtune": "0.1.0", "torch": "2.13.0+cpu"}, "total_steps": STEPS,
    }  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    if finished:
        _write_record(folder, settings, extras=extras)
    if extras:
        _write_extras(folder)
    return folder


def _write_record(folder: Path, settings: dict[str, Any], *, extras: bool) -> None:
    results: dict[str, Any] = {
        "finished": True, "steps": STEPS, "seconds": 4180.0, "peak_bytes": 2_620_000_000, "eval_loss_before": 2.45,
        "eval_loss": 1.5792, "best_eval_loss": 1.5792, "best_step": STEPS,
    }  # fmt: skip
    if extras:
        results["planned_bytes"] = {
            "weights": 988_000_000, "adapters": 140_000_000, "gradients": 140_000_000, "optimizer_states": 280_000_000,
            "activations": 610_000_000, "logits": 180_000_000, "runtime": 330_000_000, "total": 2_668_000_000,
        }  # fmt: skip
        results |= {"trained_parameters": 35_192_832, "parameters": 529_225_600}
    record = {
        "method": "lora", "base_model": BASE, "base_fingerprint": "e032ac7441801c6f", "system_prompt": None,
        "prompt_style": "chat", "stop_ids": [2], "settings": settings, "results": results,
        "versions": {"qingtune": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2"},
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def _write_extras(folder: Path) -> None:
    prompts = ["写一条小红书风格的笔记。\n\n店名：蓝门\n品类：面包房\n地址：磨坊巷4号", HOSTILE, "长" * 300 + "x" * 400]
    answers = {0: "这是一家面包店，欢迎光临。", STEPS // 2: "七点出炉。", STEPS: POST}
    write_jsonl(
        folder / SAMPLES,
        [
            {"step": step, "prompt": prompt, "reference": POST, "answer": HOSTILE if prompt == HOSTILE else answer}
            for step, answer in answers.items()
            for prompt in prompts
        ],
    )
    metrics = {
        "loss": _change((2.45, None), (1.5792, None), (-0.8708, [-0.95, -0.79])),
        "BLEU": _change((3.12, [2.0, 4.1]), (11.87, [9.5, 14.0]), (8.75, [6.2, 11.4])),
        "distinct-2": _change((0.61, None), (0.64, None), (0.03, [-0.02, 0.08])),
        "ended by itself %": _change((90.0, None), (100.0, None), (10.0, None)),
        "form: all %": _change(None, (93.3, [80.0, 100.0]), None),
    }
    (folder / EVALUATION).write_text(json.dumps({"metrics": metrics}), encoding="utf-8")


Estimate = tuple[float, list[float] | None] | None


def _change(before: Estimate, after: Estimate, difference: Estimate) -> dict[str, Any]:
    interval = difference and difference[1]
    return {
        name: estimate and {"value": estimate[0], "interval": estimate[1]}
        for name, estimate in (("before", before), ("after", after), ("difference", difference))
    } | {"difference_excludes_zero": None if interval is None else interval[0] > 0 or interval[1] < 0}
