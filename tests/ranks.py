"""Runs of the recipe by several processes on this machine, with gloo, forked from one that has the libraries."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

from fork_server import ForkServer

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def train_by(count: int, fork_server: ForkServer, output: Path, model: Path, data: Path, **settings: Any) -> str:
    """Train in fp32 with a logged line a step, by this many processes; returns what they report.

    Raises:
        AssertionError: one of them failed; with what they report.
    """
    values = {
        "model_name_or_path": str(model), "data_path": str(data), "output_dir": str(output), "bf16": False,
        "report_to": "none", "logging_steps": 1, "learning_rate": 0.01, **settings,
    }  # fmt: skip
    file = output.with_name(f"{output.name}.config.json")
    file.write_text(json.dumps(values))
    address = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with output.with_name(f"{output.name}.log").open("w+") as log:
        streams = (subprocess.DEVNULL, subprocess.DEVNULL, log)
        command = ("-m", "qingtune", "train", "--config_file", file)
        ranks = [
            fork_server.start(*command, streams=streams, RANK=rank, LOCAL_RANK=rank, **ENVIRONMENT, **address)
            for rank in map(str, range(count))
        ]
        codes = [rank.wait(timeout=300) for rank in ranks]
        log.seek(0)
        reported = log.read()
    assert codes == [0] * count, reported
    return reported
