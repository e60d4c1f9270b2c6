"""LoRA training with LLaMA-Factory's SFT stage on the CPU: python run_llamafactory.py WORKLOAD.json RESULT.json.

LLaMA-Factory tokenises the rows itself, with its `qwen` template: the workload's tokens and, trained too, the line
break after the answer's end.
"""

import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path

from measuring import batch_of, make_recorder, prepare, refuse_quantisation, trainer_arguments, write_result

# Samples a micro-batch. Tried on a busy machine, so in CPU seconds of one thread for a first step of 8 samples, with a
# random model of the real one's width and 4 layers: batch 1 17.3, batch 4 19.2. One sample needs no padding and has
# the smallest logits.
# With the real 0.5B model: batch 1 41.4 (3.7 GB), batch 4 45.3 (8.0 GB).
BATCH = 1


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio whatever it trains; its build on PyPI does not load beside a CPU torch."""
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", loader=None)
    sys.modules["torchaudio"] = module


def write_dataset(rows: list[dict], folder: Path) -> None:
    """The rows, and the description by which LLaMA-Factory reads them."""
    lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    columns = {"messages": "messages"}
    description = {"rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(description), encoding="utf-8")


def arguments(workload: dict, scratch: str) -> dict:
    return {
        **trainer_arguments(workload, BATCH, scratch),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": workload["lora_r"],
        "lora_alpha": workload["lora_alpha"],
        "lora_dropout": workload["lora_dropout"],
        "model_name_or_path": workload["model"],
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "template": "qwen",
        "dataset": "rows",
        "dataset_dir": scratch,
        "cutoff_len": workload["max_length"],
        "disable_shuffling": True,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        workload, rows = prepare(scratch)
        refuse_quantisation(workload, "LLaMA-Factory")
        stand_in_for_torchaudio()
        write_dataset(rows, Path(scratch))
        from llamafactory.train.tuner import run_exp

        recorder = make_recorder(rows)
        run_exp(arguments(workload, scratch), callbacks=[recorder])
    batch, accumulation = batch_of(workload, BATCH)
    settings = f"batch {batch} x accumulation {accumulation}, {workload['dtype']}, SDPA, fused AdamW"
    write_result("LLaMA-Factory", "llamafactory", settings, recorder)


if __name__ == "__main__":
    main()
