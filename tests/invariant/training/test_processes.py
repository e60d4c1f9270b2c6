"""Two processes give what one gives: same losses, same weights, one result."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, write_jsonl
from fork_server import ForkServer
from ranks import ENVIRONMENT, free_port
from tiny_runs import LORA, assert_close, losses, metrics, save_model, train, weights

# Windows of 8 from 18 rows: 8, 8 and 2, the last one too small for the second process to get any.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "per_device_eval_batch_size": 3,
}


Run = Callable[..., subprocess.CompletedProcess[str]]


def torchrun() -> list[str]:
    """What `torchrun --nproc_per_node 2` runs, on a port of its own."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]


def test_two_processes_equal_one(tmp_path: Path, run: Run) -> None:
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
    ended = run(*torchrun(), "-m", "qingtune", "train", *flags, **ENVIRONMENT)
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
    assert ended.stderr.count("Processes: 2. Each holds the whole model") == 1
    assert ended.stderr.count("Device: ") == 1  # the second process says nothing
    assert ended.stdout.count("Chat with it") == 1


def test_accelerate_launch_that_starts_one_process_of_two_is_reported(tmp_path: Path, run: Run) -> None:
    model, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", instruction_rows(6))
    flags = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "output"]
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    ended = run(*launcher, "fine_tune_qwen.py", *flags, "--dry_run", **ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    assert "Warning: accelerate launch was asked for several processes, but started one" in ended.stderr
    assert "Use torchrun --nproc_per_node 2 -m qingtune train" in ended.stderr


# --- Two processes with disks of their own ---------------------------------------------------------------------------

ON_OWN_DISK = """
import os, sys
os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
from qingtune.cli import main
sys.exit(main(sys.argv[2:]))
"""


def extend_on_two_disks(tmp_path: Path, fork_server: ForkServer, *, shared: bool) -> tuple[list[int], str]:
    """Extend a finished run of two steps to four with two processes, the second of which has the checkpoint or not.

    Returns:
        Their exit codes, and what both report.
    """
    model, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", instruction_rows(18))
    settings = LORA | {"optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
    one = settings | {"per_device_train_batch_size": 4}
    train(tmp_path / "0" / "run", model, data, max_steps=2, **one)
    train(tmp_path / "whole", model, data, max_steps=4, **one)
    if shared:
        shutil.copytree(tmp_path / "0" / "run" / "checkpoint-2", tmp_path / "1" / "run" / "checkpoint-2")
    values = json.loads((tmp_path / "0" / "run.config.json").read_text())
    values |= {"output_dir": "run", "max_steps": 4, "per_device_train_batch_size": 2}
    (tmp_path / "two.json").write_text(json.dumps(values))
    command = ("-c", ON_OWN_DISK, tmp_path, "train", "--config_file", tmp_path / "two.json")
    shared_by_all = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    log = tmp_path / "log"
    with log.open("a") as file:
        streams = (subprocess.DEVNULL, subprocess.DEVNULL, file)
        ranks = [
            fork_server.start(*command, streams=streams, RANK=rank, LOCAL_RANK=rank, **shared_by_all)
            for rank in ("0", "1")
        ]
    return [rank.wait(timeout=300) for rank in ranks], log.read_text()


def test_the_first_process_decides_where_all_resume(tmp_path: Path, fork_server: ForkServer) -> None:
    codes, reported = extend_on_two_disks(tmp_path, fork_server, shared=True)
    assert codes == [0, 0], reported
    assert reported.count("is finished after 2 steps; continuing to 4") == 1
    assert_close(weights(tmp_path / "0" / "run"), weights(tmp_path / "whole"), share=1e-4)


def test_a_process_without_the_chosen_checkpoint_ends_all(tmp_path: Path, fork_server: ForkServer) -> None:
    codes, reported = extend_on_two_disks(tmp_path, fork_server, shared=False)
    assert 0 not in codes
    assert "process 0 resumes from this checkpoint, but this process cannot read it" in reported
    assert "process 1 failed: " in reported
