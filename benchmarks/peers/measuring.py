"""What the peers' scripts share: reading the workload, measuring the steps from outside, writing the result.

Imports nothing heavy before `prepare` has set the number of threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_NET = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def linear_layers(workload: dict) -> list[str]:
    """The names of all linear layers but the head."""
    config = json.loads((Path(workload["model"]) / "config.json").read_text(encoding="utf-8"))
    return ATTENTION_AND_MLP + DELTA_NET * ("linear_attention" in config.get("layer_types", []))


def prepare(scratch: str) -> tuple[dict, list[dict]]:
    """Read the workload named on the command line; keep the process on the CPU, its threads, and its caches in scratch.

    Returns:
        The workload, and the rows that its steps train on.
    """
    workload = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with Path(workload["rows"]).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: workload["steps"] * workload["samples_per_step"]]
    if len(rows) < workload["steps"] * workload["samples_per_step"]:
        sys.exit(f"{workload['rows']} holds {len(rows)} rows, too few for {workload['steps']} steps")
    settings = {
        "OMP_NUM_THREADS": str(workload["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{scratch}/datasets",
        "MODELSCOPE_CACHE": f"{scratch}/modelscope",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    os.environ.update(settings)
    import torch

    torch.set_num_threads(workload["threads"])
    return workload, rows


def refuse_quantisation(workload: dict, system: str) -> None:
    if workload["quantization_bit"] is not None:
        sys.exit(f"{system} is measured with a 16-bit base only; quantization_bit must be null")


def batch_of(workload: dict, best: int) -> tuple[int, int]:
    """Samples a micro-batch and accumulation; the workload may hold a "batch" to try another than the peer's best."""
    batch = min(workload.get("batch") or best, workload["samples_per_step"])
    return batch, workload["samples_per_step"] // batch


def trainer_arguments(workload: dict, best_batch: int, scratch: str) -> dict:
    """The settings that all three peers take by the same names, those of Transformers' TrainingArguments."""
    batch, accumulation = batch_of(workload, best_batch)
    return {
        "output_dir": f"{scratch}/output",
        "max_steps": workload["steps"],
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": workload["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": workload["dtype"] == "bf16",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "seed": 1,
    }


def make_recorder(rows: list[dict]):
    """A trainer callback that takes each step's time, loss and tokens, and the rows that the model was shown."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self):
            self.losses: list[float] = []
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self.first_step_after_s = 0.0
            self.samples: list[list[int]] = []

        def on_train_begin(self, args, state, control, model=None, **others):
            model.register_forward_pre_hook(self.look, with_kwargs=True)

        def look(self, model, positional, named):
            ids, mask = named["input_ids"], named["attention_mask"].bool()
            self.tokens[-1] += int(mask.sum())
            self.samples += [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]

        def on_step_begin(self, args, state, control, **others):
            self.tokens.append(0)
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **others):
            self.seconds.append(time.perf_counter() - self.started)
            self.first_step_after_s = self.first_step_after_s or _age()

        def on_log(self, args, state, control, logs=None, **others):
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def check_samples(self):
            """Stop if the model saw other rows, or other tokens in them, than the workload's (the ends may differ)."""
            for number, (row, seen) in enumerate(zip(rows, self.samples, strict=True)):
                wanted = row["token_ids"][: len(seen)]
                if seen[: len(wanted)] != wanted or len(seen) < len(row["token_ids"]):
                    sys.exit(f"row {number}: the trainer showed the model other tokens than the workload's")

    return Recorder()


def write_result(system: str, package: str, settings: str, recorder) -> None:
    recorder.check_samples()
    result = {
        "system": system,
        "version": version(package),
        "settings": settings,
        "losses": recorder.losses,
        "seconds": recorder.seconds,
        "tokens": recorder.tokens,
        "peak_bytes": _peak_bytes(),
        "first_step_after_s": recorder.first_step_after_s,
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _age() -> float:
    """Seconds since this process began."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _peak_bytes() -> int | None:
    """The most memory this process held at once (VmHWM); None where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else None
    return None
