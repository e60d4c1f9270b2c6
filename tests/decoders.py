"""Models, batches and comparisons for the tests of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from tiny_runs import lively, make_samples, move_adapters

from qingtune.adapters.lora import add_lora, member
from qingtune.adapters.variants import Variant
from qingtune.data.batch import Batch, collate
from qingtune.data.tokenize import Sample
from qingtune.kernels.attention_block import AttentionBlock
from qingtune.kernels.decoder import TrainingDecoder, why_not
from qingtune.kernels.loss import summed_loss
from qingtune.kernels.mlp_block import MLPBlock
from qingtune.models.quantize import quantize_model

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 9,
    "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.5, 4.0, 9.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
QWEN35 = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "attention_bias": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases linear": ("llama", {**BIASES, "rope_parameters": LINEAR}),
    "llama biases yarn": ("llama", {**BIASES, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 2}),  # which it does not look at
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "ministral": (
        "ministral",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral, window in the last layer": (
        "ministral",
        {"head_dim": 12, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2 untied without caps, window in the last layer": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3 untied, window in the last layer": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 3,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7, "pad_token_id": 0}),
    "phi3 longrope": ("phi3", {"tie_word_embeddings": False, "pad_token_id": 0, "rope_parameters": LONGROPE}),
    "qwen3.5": ("qwen3_5_text", QWEN35 | {"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3.5, delta net last": (
        "qwen3_5_text",
        QWEN35
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3": (  # its own token for padding would get no gradient from nn.Embedding, though samples hold it
        "ministral3",
        {"head_dim": 12, "pad_token_id": 0, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}},
    ),
}
# Adapters go to those of them that the model has.
ALL_LINEAR = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj",
]  # fmt: skip
# Which layers get adapters; None for full training.
TRAINED: dict[str, list[str] | None] = {
    "full": None,
    "lora": ALL_LINEAR,
    "lora on q": ["q_proj", "qkv_proj"],
    "lora on k and down": ["k_proj", "down_proj"],
    "lora on the last mlp": ["layers.1.mlp.gate_proj", "layers.1.mlp.gate_up_proj", "layers.1.mlp.down_proj"],
    "dora": ALL_LINEAR,
    "dora on v and the last mlp": ["v_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.down_proj"],
}
# By a model with all that sets its family apart, for tests that take too long for each of MODELS.
OLDER, NEWER = (
    ["qwen2", "qwen3", "llama"],
    ["ministral", "ministral3", "gemma2", "gemma3", "phi3 longrope", "qwen3.5, delta net last"],
)
Gradients = dict[str, torch.Tensor]


def make_decodable(
    name: str, trained: str = "lora", dtype: torch.dtype = torch.float32, bits: int | None = None, rank: int = 3
) -> Any:
    """A lively model of MODELS with adapters that have moved, where `trained` wants them."""
    kind, changes = MODELS[name]
    model = lively(make_model(kind, **changes))
    model.set_attn_implementation("eager")
    if bits:
        quantize_model(model, bits, torch.device("cpu"))
    if (layers := TRAINED[trained]) is not None:
        layers = [end for end in layers if any(f".{name}".endswith(f".{end}") for name, _ in model.named_modules())]
        add_lora(model, layers, r=rank, alpha=6, dropout=0.0, variant=Variant(use_dora=trained.startswith("dora")))
        move_adapters(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    assert why_not(model) is None
    return model


def random_sample(length: int, seed: int, beginning: Sequence[int] = (), share: float = 0.6) -> Sample:
    """A beginning that is not trained, then `length` random tokens, some of them trained, the last one surely."""
    draw = np.random.default_rng(seed)
    ids = np.concatenate([np.asarray(beginning, np.int32), draw.integers(3, 320, length)]).astype(np.int32)
    trained = np.concatenate([np.zeros(len(beginning), np.bool_), draw.random(length) < share])
    trained[-1:] = bool(share) and length > 0
    return Sample(ids, trained, f"row {seed}")


def _all_trained(sample: Sample) -> Sample:
    return Sample(sample.token_ids, np.ones(len(sample.token_ids), np.bool_), sample.origin)


@lru_cache
def batches() -> dict[str, Batch]:
    """Micro-batches of every shape that asks something of the layout or of attention."""
    few, longer, many = range(10, 17), range(10, 19), range(20, 320)
    samples: dict[str, list[Sample]] = {
        "single tokens and nothing trained among others": make_samples(),
        "one sample": [random_sample(9, 1)],
        "one sample of two tokens": [_all_trained(random_sample(2, 1))],
        "many samples": [random_sample(2 + seed % 11, seed) for seed in range(22)],
        "several blocks": [random_sample(600, 1), random_sample(3, 2)],
        "common beginning": [random_sample(length, seed, few) for seed, length in enumerate([5, 1, 30, 2])],
        "common beginning, one trains nothing": [random_sample(4, 1, few), random_sample(6, 2, few, share=0.0)],
        "common beginning of several blocks": [
            random_sample(length, seed, many) for seed, length in ((1, 280), (2, 2))
        ],
        "beginning is a whole sample": [random_sample(0, 1, few), *(random_sample(4, seed, longer) for seed in (2, 3))],
        "trained tokens in the beginning": [_all_trained(random_sample(5, seed, few)) for seed in (1, 2)],
        "the same sample twice": [random_sample(8, 1, few)] * 2,
    }
    return {name: collate(group) for name, group in samples.items()}


def trained_gradients(model: Any) -> Gradients:
    """The gradient of each trained parameter, which is then taken from it."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(found)  # nothing frozen has one
    model.zero_grad(set_to_none=True)
    return found


def decoded(
    model: Any, batch: Batch, scale: float = 1.0, decoder: TrainingDecoder | None = None
) -> tuple[float, Gradients]:
    """Loss and gradients of a decoder; a new one unless given."""
    dtype = next(model.parameters()).dtype
    decoder = decoder or TrainingDecoder(model, dtype, member)
    loss = decoder.add_gradients(batch, torch.tensor(scale, dtype=dtype))
    return float(loss), trained_gradients(model)


def reference(model: Any, batch: Batch, scale: float = 1.0) -> tuple[float, Gradients]:
    """What Transformers' modules and autograd give, a sample at a time."""
    loss = sum((summed_loss(model, sample, plain_head=False) for sample in batch.trained_samples()), torch.zeros(()))
    (loss * scale).backward()
    return float(loss.detach()), trained_gradients(model)


def apart(found: Gradients, wanted: Gradients) -> float:
    """The largest error of any gradient, relative in Frobenius norms, small ones as if they were larger.

    Where a token sees itself alone, gradients of queries and keys are zero, and what autograd gives is rounding: so no
    norm counts as less than 0.05 or a tenth of the largest.
    """
    assert found.keys() == wanted.keys()
    least = max(0.05, 0.1 * max(float(gradient.norm()) for gradient in wanted.values()))
    return max(float((found[name] - wanted[name]).norm()) / max(float(wanted[name].norm()), least) for name in wanted)


def apart_in_all(found: Gradients, wanted: Gradients) -> float:
    """The relative error of all gradients taken as one vector."""
    assert found.keys() == wanted.keys()
    one, two = (torch.cat([gradients[name].flatten() for name in wanted]) for gradients in (found, wanted))
    return float((one - two).norm() / two.norm())


def filled(rows: int) -> int:
    """Rows of a pass with what it is filled up with."""
    return -(-rows // 8) * 8


def rows_computed(monkeypatch: pytest.MonkeyPatch, block: type[AttentionBlock] | type[MLPBlock]) -> list[int]:
    """A list that grows by the rows of each forward of such a block from now on."""
    rows: list[int] = []
    forward: Any = block.forward

    def counted(self: Any, x: torch.Tensor, *rest: Any) -> None:
        rows.append(len(x))
        forward(self, x, *rest)

    monkeypatch.setattr(block, "forward", counted)
    return rows
