"""Two processes give what one gives: same losses, same weights, one result."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, assert_close, losses, metrics, save_model, train, weights

# Windows of 8 from 18 rows: 8, 8 and 2, the last one too small for the second process to get any.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "per_device_eval_batch_size": 3,
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_equal_one(tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    model = save_model(tmp_path / "model")
    rows = instruction_rows(25)
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:18])
    settings = SETTINGS | LORA | {"eval_data_path": str(write_jsonl(tmp_path / "eval.jsonl", rows[18:]))}
    train(tmp_path / "one", model, data, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)

    values = {
        "model_name_or_path": model, "data_path": data, "output_dir": tmp_path / "two", "logging_steps": 1,
        "bf16": False, "report_to": "none", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        **settings,
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    before = set(tmp_path.iterdir())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    ended = run(*launcher, "fine_tune_qwen.py", *flags, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr

    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(losses(tmp_path / "one")) == 3
    for mine, other in zip(one, two, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), share=1e-4)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "two"}
    folders = [
        {path.relative_to(folder) for path in folder.rglob("*")} for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert folders[0] == folders[1]
    assert ended.stderr.count("Device: ") == 1  # the second process says nothing
    assert ended.stdout.count("Talk to it") == 1
