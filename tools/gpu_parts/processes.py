"""Two processes that share the device, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from gpu_parts.commands import DATA, LENGTH, ROOT, model_folder
from gpu_parts.scale import Result, Scale

BOUND = 2e-2, 1e-4  # of the losses: on a GPU, and in fp32 on a CPU
SECONDS = 25  # for either run


def part(scale: Scale) -> Result:
    """Losses of three steps of eight samples by one process and by two."""
    losses = {count: _losses(scale, count) for count in (1, 2)}
    result = Result([{"processes": count, "losses": str(seen)} for count, seen in losses.items()])
    apart = max(abs(one - other) for one, other in zip(*losses.values(), strict=True))
    if apart > BOUND[not scale.on_gpu]:
        result.faults.append(f"two processes have other losses than one: {apart:.2g}")
    return result


def _losses(scale: Scale, count: int) -> list[float]:
    output = scale.scratch / f"processes-{count}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
        "-m", "qingtune", "train", "--model_name_or_path", str(model_folder(scale)), "--data_path", str(DATA),
        "--output_dir", str(output), "--use_lora", "--lora_r", "8", "--per_device_train_batch_size", str(8 // count),
        "--max_steps", "3", "--logging_steps", "1", "--report_to", "none", "--max_seq_length", str(LENGTH),
        *([] if scale.on_gpu else ["--bf16", "false"]),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=SECONDS * scale.patience,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{count} processes ended with {done.returncode}: {done.stdout[-600:]}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
