"""The tiny models, adapters, runs and files that attacks spoil, made once; functions run in children of the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_START, IM_END = 1, 2  # ids of the template's control tokens
TEXTS = ["Write a post about a bakery.", "Fresh bread at seven.", "店名：蓝门\n品类：面包房", "七点出炉，热的 🥖 #面包"]
ROWS = [
    {"instruction": TEXTS[number % 2], "input": f"shop {number}", "output": f"{TEXTS[1]} {number}"}
    for number in range(12)
]


def make_models(folder: str) -> None:
    """Tiny models of three architectures with one tokenizer, a PEFT adapter without a record, and rows."""
    root = Path(folder)
    save_model(root / "model", "Qwen2")
    save_model(root / "llama", "Llama", tie_word_embeddings=False)
    save_model(root / "qwen3", "Qwen3", head_dim=8)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def save_model(folder: Path, kind: str, **changes: Any) -> None:
    """A random model of hidden size 32 and two layers."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": IM_END,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer(vocabulary: int = 320) -> Any:
    """A byte-level BPE tokenizer with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(TEXTS * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


_TRAIN = (
    "train", "--model_name_or_path", "model", "--data_path", "rows.jsonl", "--report_to", "none", "--bf16", "false",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "0.01", "--val_size", "2",
    "--eval_samples", "1", "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps",
)  # fmt: skip
_LORA = ("--use_lora", "true", "--lora_r", "4")
# Run in the fixtures' folder, in this order; each is a command whose imports are preloaded later.
COMMANDS: tuple[tuple[str, ...], ...] = (
    (*_TRAIN, "4", *_LORA, "--save_steps", "1", "--save_total_limit", "2", "--output_dir", "run"),
    (*_TRAIN, "2", "--output_dir", "full"),
    ("merge", "--base_model", "model", "--lora_model", "run", "--output_dir", "merged"),
    ("export", "--base_model", "model", "--output_dir", "gguf", "--quantize", "q8_0"),
    ("infer", "--base_model", "gguf/gguf-q8_0.gguf", "--prompt", "hi", "--max_new_tokens", "2"),
    ("infer", "--base_model", "model", "--lora_model", "run", "--prompt", "hi", "--max_new_tokens", "2",
     "--load_in_4bit"),
    ("evaluate", "--base_model", "model", "--lora_model", "run", "--data", "rows.jsonl", "--limit", "2", "--output_dir",
     "evaluation", "--max_new_tokens", "2"),
    ("plan", "--model_name_or_path", "model", "--data_path", "rows.jsonl"),
    ("check", "--data", "rows.jsonl", "--model_name_or_path", "model"),
    ("report", "--output_dir", "run"),
    ("push", "--folder", "merged", "--repo", "me/tiny"),
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "qingtune.json")


# What is made out of the results of other commands.
_OUT_OF = {"adapter": "run", "foreign": "run", "stopped": "run", "model.gguf": "gguf", "cache": "gguf"}


def needed(argv: tuple[str, ...], needs: set[str]) -> bool:
    """Whether a command makes one of these fixtures."""
    made = argv[argv.index("--output_dir") + 1] if "--output_dir" in argv else None
    return made is not None and made in {_OUT_OF.get(name, name) for name in needs}


def arrange(root: Path) -> None:
    """What follows from the commands' results: adapters with and without a record, and a run that was stopped."""
    if (root / "gguf").exists():
        shutil.copy(next((root / "gguf").glob("*.gguf")), root / "model.gguf")
    if not (root / "run").exists():
        return
    for name, files in (("adapter", _ADAPTER), ("foreign", _ADAPTER[:2])):
        (root / name).mkdir()
        for file in files:
            shutil.copy(root / "run" / file, root / name / file)
    stopped = root / "stopped"
    shutil.copytree(root / "run", stopped)
    for path in stopped.iterdir():
        if path.name in (*_ADAPTER, "README.md", "report.html") or path.name.startswith(("tokenizer", "chat_template")):
            path.unlink()
    shutil.rmtree(stopped / "checkpoint-4")
    (stopped / "latest_checkpoint.json").write_text(json.dumps({"folder": "checkpoint-3"}))
