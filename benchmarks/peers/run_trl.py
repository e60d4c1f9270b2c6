"""LoRA or QLoRA training with TRL's SFTTrainer on the CPU: python run_trl.py WORKLOAD.json RESULT.json.

TRL gets the workload's tokens as they are, with -100 as the label of those that are not trained.
"""

import tempfile

from measuring import batch_of, linear_layers, make_recorder, prepare, trainer_arguments, write_result

# Samples a micro-batch. Tried on a busy machine, so in CPU seconds of one thread for a first step of 8 samples, with a
# random model of the real one's width and 4 layers: batch 1 31.5, batch 4 39.5. One sample needs no padding and has
# the smallest logits.
BATCH = 1


def make_trainer(workload: dict, rows: list[dict], scratch: str, recorder):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **trainer_arguments(workload, BATCH, scratch),
        use_cpu=True,
        train_sampling_strategy="sequential",
        max_length=workload["max_length"],
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": dtype_of(workload), "attn_implementation": "sdpa"},
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=workload["lora_r"],
        lora_alpha=workload["lora_alpha"],
        lora_dropout=workload["lora_dropout"],
        target_modules=linear_layers(workload),
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(
        model=workload["model"],
        args=arguments,
        train_dataset=Dataset.from_list([tokenised(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(workload["model"]),
        peft_config=lora,
        quantization_config=quantisation(workload),
        callbacks=[recorder],
    )


def tokenised(row: dict) -> dict:
    labels = [token if trained else -100 for token, trained in zip(row["token_ids"], row["trained"], strict=True)]
    return {"input_ids": row["token_ids"], "labels": labels}


def dtype_of(workload: dict):
    import torch

    return torch.bfloat16 if workload["dtype"] == "bf16" else torch.float32


def quantisation(workload: dict):
    from transformers import BitsAndBytesConfig

    bits = workload["quantization_bit"]
    if bits is None:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(workload),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        workload, rows = prepare(scratch)
        recorder = make_recorder(rows)
        make_trainer(workload, rows, scratch, recorder).train()
    batch, accumulation = batch_of(workload, BATCH)
    dtype = workload["dtype"]
    base = {None: dtype, 4: "NF4, double quantisation", 8: "LLM.int8"}[workload["quantization_bit"]]
    settings = f"batch {batch} x accumulation {accumulation}, base {base}, {dtype}, SDPA, fused AdamW"
    write_result("TRL", "trl", settings, recorder)


if __name__ == "__main__":
    main()
