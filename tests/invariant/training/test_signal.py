"""SIGTERM to the command itself: exit code 130, a checkpoint, and the same command finishes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from fork_server import ForkServer
from tiny_runs import assert_equal, metrics, save_model, train, weights, without_gpu

from qingtune.cli import main

STEPS = 40


def test_terminated_command_goes_on_where_it_stopped(tmp_path: Path, data_file: Path, fork_server: ForkServer) -> None:
    model, output = save_model(tmp_path / "model"), tmp_path / "output"
    settings = {"use_lora": True, "lora_dropout": 0.2, "max_steps": STEPS, "save_total_limit": 1}
    values = {
        "model_name_or_path": model, "data_path": data_file, "output_dir": output, "learning_rate": 0.01,
        "bf16": False, "report_to": "none", "logging_steps": 1, **settings,
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    command = ("fine_tune_qwen.py", *flags, "--overwrite_output_dir", "true")
    log = tmp_path / "log"
    with log.open("w") as file:
        process = fork_server.start(*command, streams=(subprocess.DEVNULL, file, file), CUDA_VISIBLE_DEVICES="")
    deadline = time.monotonic() + 400  # a machine that is busy otherwise takes long to start
    while not ((output / "metrics.jsonl").exists() and metrics(output)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, told = process.wait(timeout=300), log.read_text()
    assert code == 130, told
    told_to = rf"{sys.executable} fine_tune_qwen\.py .* --overwrite_output_dir true --overwrite_output_dir false\n"
    stopped = re.search(rf"Stopped and saved after step (\d+)\. To resume: {told_to}", told)
    assert stopped, told
    assert 0 < int(stopped[1]) < STEPS
    assert (output / f"checkpoint-{stopped[1]}" / "state.json").exists()

    with without_gpu():
        assert main(["train", *flags]) == 0  # in this process: what the first one left is what matters
    train(tmp_path / "whole", model, data_file, **settings)
    assert metrics(output) == metrics(tmp_path / "whole")
    assert_equal(weights(output), weights(tmp_path / "whole"))
