"""LoRA training with ms-swift's SFT pipeline on the CPU: python run_ms_swift.py WORKLOAD.json RESULT.json.

ms-swift tokenises the rows itself, with its template for Qwen2.5: the workload's tokens and, trained too, the line
break after the answer's end.
"""

import json
import tempfile
from pathlib import Path

from measuring import (
    batch_of,
    linear_layers,
    make_recorder,
    prepare,
    refuse_quantisation,
    trainer_arguments,
    write_result,
)

# Samples a micro-batch. Tried on a busy machine, so in CPU seconds of one thread for a first step of 8 samples, with a
# random model of the real one's width and 4 layers: batch 1 12.5, batch 4 24.3. One sample needs no padding and has
# the smallest logits.
BATCH = 1
# Its names for kinds of models; Transformers loads what config.json says, its "qwen3_5" wants the vision tower's tools.
MODEL_TYPES = {"qwen2": "qwen2", "qwen3_5_text": "qwen3", "gemma3_text": "gemma3_text", "olmo2": "llama"}


def make_arguments(workload: dict, rows: list[dict], scratch: str):
    from swift.arguments import SftArguments

    config = json.loads((Path(workload["model"]) / "config.json").read_text(encoding="utf-8"))
    dataset = Path(scratch) / "rows.jsonl"
    lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows]
    dataset.write_text("".join(lines), encoding="utf-8")
    return SftArguments(
        **{**trainer_arguments(workload, BATCH, scratch), "report_to": ["none"]},
        model=workload["model"],
        model_type=MODEL_TYPES[config["model_type"]],
        template="qwen2_5",
        torch_dtype={"bf16": "bfloat16", "fp32": "float32"}[workload["dtype"]],
        attn_impl="sdpa",
        tuner_type="lora",
        target_modules=linear_layers(workload),
        lora_rank=workload["lora_r"],
        lora_alpha=workload["lora_alpha"],
        lora_dropout=workload["lora_dropout"],
        dataset=[str(dataset)],
        max_length=workload["max_length"],
        dataset_shuffle=False,
        train_dataloader_shuffle=False,
        dataloader_persistent_workers=False,
        gradient_checkpointing=False,
        use_logits_to_keep=True,
        adam_beta2=0.999,
        eval_strategy="no",
        check_model=False,
        add_version=False,
        use_cpu=True,
        disable_tqdm=True,
    )


def train(arguments, recorder) -> None:
    from swift.pipelines import SwiftSft

    class Recorded(SwiftSft):
        def train(self, trainer):
            trainer.add_callback(recorder)
            return super().train(trainer)

    Recorded(arguments).main()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        workload, rows = prepare(scratch)
        refuse_quantisation(workload, "ms-swift")
        recorder = make_recorder(rows)
        train(make_arguments(workload, rows, scratch), recorder)
    batch, accumulation = batch_of(workload, BATCH)
    settings = (
        f"batch {batch} x accumulation {accumulation}, {workload['dtype']}, SDPA, fused AdamW, "
        "logits of the answers' part only"
    )
    write_result("ms-swift", "ms-swift", settings, recorder)


if __name__ == "__main__":
    main()
