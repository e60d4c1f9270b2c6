"""What the systems are compared on: a model, bundled samples, and the order in which every system sees them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a clone is used as it is, without being installed
DATA = ROOT / "data" / "store_xhs_sft_samples.jsonl"
SEED = 42
MAX_LENGTH = 2048
# Told to every system, as their templates differ in what they say by themselves.
SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Published shapes by the models' names: Transformers' type, and what of its configuration is not the default.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "qwen2",
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "rope_theta": 1e6,
        },
    ),
    "qwen3.5-0.8b": (
        "qwen3_5_text",
        {
            "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
            "linear_num_value_heads": 16, "rope_theta": 1e7,
        },
    ),
    "gemma-3-1b": (
        "gemma3_text",
        {
            "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 5e5,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
            "rope_theta": 1e6, "tie_word_embeddings": False,
        },
    ),
    "ministral-8b": (
        "ministral",
        {
            "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 32768,
            "rope_theta": 1e8, "tie_word_embeddings": False,
        },
    ),
    "ministral-3-3b": (
        "ministral3",
        {
            "vocab_size": 131072, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
        },
    ),
    "phi-3-mini": (
        "phi3",
        {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047, "tie_word_embeddings": False,
        },
    ),
    "phi-4-mini": (
        "phi3",
        {
            "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "sliding_window": 262144,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48,
            },
        },
    ),
    # Its published shape, with 16 of 128 experts and 32,768 of 151,936 tokens.
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 32768, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6,
        },
    ),
    # Of an architecture without kernels of ours; its published shape, with 8 of 16 layers.
    "olmo-2-1b": (
        "olmo2",
        {
            "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
            "num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 5e5,
        },
    ),
}  # fmt: skip
DEFAULT_SHAPE = "qwen2.5-0.5b"
# How Qwen2's tokenizer cuts text into words; some versions of Transformers put it in place of a tokenizer's own.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_folder() -> Path:
    """Where the benchmark's model and the peers' environments are kept."""
    from qingtune.files.paths import default_cache

    return default_cache()


def model_folder(given: str | None, shape: str = DEFAULT_SHAPE) -> Path:
    """The model that the user names, or random weights of a shape."""
    return Path(given) if given else random_model(cache_folder() / f"bench-{shape}", shape)


def random_model(folder: Path, shape: str = DEFAULT_SHAPE, layers: int | None = None, *, wide: bool = False) -> Path:
    """Weights of a published shape without its training, and a tokenizer learnt from the bundled samples.

    Args:
        layers: how many, if not all.
        wide: whether the tokenizer has as many tokens as the model instead, so that it takes as much memory.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    import transformers

    kind, sizes = SHAPES[shape]
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"max_position_embeddings": 32768, "tie_word_embeddings": True, **ends, **sizes}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    _tokenizer(sizes["vocab_size"] if wide else None).save_pretrained(folder)
    return folder


def _tokenizer(count: int | None):
    """Learnt from the bundled samples, or of so many tokens of up to three bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE())
    if count:
        pairs = [(one, letter) for one in sorted(alphabet) for letter in sorted(alphabet)]
        longer = [(one + two, letter) for one, two in pairs for letter in sorted(alphabet)]
        pairs = [*pairs, *longer][: count - len(special) - len(alphabet)]
        tokens = [*special, *sorted(alphabet), *map("".join, pairs)]
        inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    if not count:
        trainer = trainers.BpeTrainer(
            vocab_size=6000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(DATA.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(model: Path, path: Path, count: int, samples_per_step: int) -> dict[str, float]:
    """Write the first samples of a run in the order it takes them; returns their mean length and trained share."""
    from qingtune.data.format import read_conversations
    from qingtune.data.order import Plan
    from qingtune.data.tokenize import make_template, tokenize
    from qingtune.models.load import load_tokenizer, stop_ids

    template = make_template(load_tokenizer(model), stop_ids(model))
    conversations = read_conversations([str(DATA)], SYSTEM_PROMPT, "raise").conversations
    samples = tokenize(template, conversations, MAX_LENGTH, "raise").samples
    assert len(samples) == len(conversations)
    plan = Plan(len(samples), samples_per_step, 1, 1, SEED)
    steps = -(-count // samples_per_step)
    order = [int(index) for step in range(steps) for index in plan.window(step)][:count]
    with path.open("w", encoding="utf-8") as file:
        for index in order:
            ids, trained = samples[index].token_ids.tolist(), samples[index].trained.astype(int).tolist()
            messages = [{"role": m.role, "content": m.content} for m in conversations[index].messages]
            row = {"messages": messages, "token_ids": ids, "trained": trained}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    chosen = [samples[index] for index in order]
    tokens = sum(len(sample.token_ids) for sample in chosen)
    return {
        "mean_length": tokens / len(chosen),
        "trained_share": sum(sample.trained_tokens for sample in chosen) / tokens,
    }
