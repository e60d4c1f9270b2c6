"""Every tensor has its place in GGUF, and what llama.cpp would compute otherwise is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from qingtune.errors import UserError
from qingtune.export.gguf_layout import GGUFLayout, PlacedTensor, interleaved, layout_of
from qingtune.models.stored_weights import StoredWeights

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
Place = Callable[..., GGUFLayout]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A function that lays out a tiny model, some of whose settings and tensors are changed."""

    def lay_out(
        kind: str, extra: dict[str, tuple[int, ...]] | None = None, drop: str = "", **changes: Any
    ) -> GGUFLayout:
        make_model(kind, **changes).save_pretrained(tmp_path)
        shapes = StoredWeights(tmp_path).shapes | (extra or {})
        shapes.pop(drop, None)
        return layout_of(tmp_path, shapes)

    return lay_out


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_every_tensor_has_a_place_of_its_own(kind: str, place: Place) -> None:
    layout = place(kind)
    names = [tensor.name for tensor in layout.tensors]
    assert names[0] == "token_embd.weight"
    assert len(set(names)) == len(names) == len({tensor.source for tensor in layout.tensors})
    assert ("output.weight" in names) == (kind == "llama")  # the others' heads are tied
    assert layout.embeddings == 320
    values = {name.removeprefix(f"{kind}."): value for name, value in layout.metadata.items()}
    assert values == {
        "block_count": 2, "context_length": 256, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 320, "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(32, 16), (32,)])
def test_rows_of_llama_lie_as_its_readers_undo_it(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    arranged = PlacedTensor("blk.0.attn_q.weight", "", shape, interleaved(4, 32)).arrange(tensor)
    assert not torch.equal(arranged, tensor)
    reader = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 4})
    back = reader.process(arranged.numpy(), "blk.0.attn_q.weight").weights
    assert np.array_equal(back, tensor.numpy())


def test_only_queries_and_keys_of_llama_are_put_in_another_order(place: Place) -> None:
    orders = {tensor.name: tensor.rows for tensor in place("llama", attention_bias=True).tensors}
    queries, keys = interleaved(4, 32), interleaved(2, 16)
    assert {name.split(".", 2)[2]: order for name, order in orders.items() if order} == {
        "attn_q.weight": queries, "attn_q.bias": queries, "attn_k.weight": keys, "attn_k.bias": keys
    }  # fmt: skip
    assert not any(tensor.rows or tensor.columns or tensor.change for tensor in place("qwen3").tensors)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt2", {}, 'architecture "gpt2" cannot be exported'),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding window"),
        ("qwen3", {"attention_bias": True}, r"o_proj.bias has no place"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type llama3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "yarn with beta_fast 16"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "yarn with truncate False"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    kind: str, settings: dict[str, Any], reason: str, place: Place
) -> None:
    with pytest.raises(UserError, match=reason):
        place(kind, **settings)


def test_tensors_without_a_place_and_missing_ones_are_refused(place: Place) -> None:
    with pytest.raises(UserError, match=r"mlp.router.weight has no place"):
        place("qwen2", extra={"model.layers.0.mlp.router.weight": (4, 32)})
    with pytest.raises(UserError, match=r"1 weights are missing, for example blk.1.ffn_up"):
        place("qwen2", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"lm_head.weight\) is missing"):
        place("llama", drop="lm_head.weight")


def test_stretched_positions_are_told(place: Place) -> None:
    linear = place("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    assert linear.metadata["llama.rope.scaling.type"] == "linear"
    assert linear.metadata["llama.rope.scaling.factor"] == 2.0
    yarn = place("qwen2", rope_parameters=YARN)
    assert yarn.metadata["qwen2.rope.scaling.type"] == "yarn"
    assert yarn.metadata["qwen2.rope.scaling.original_context_length"] == 64


def test_llama3_frequencies_are_those_of_transformers(place: Place, tmp_path: Path) -> None:
    layout = place("llama", rope_parameters=LLAMA3)
    model = make_model("llama", rope_parameters=LLAMA3)
    plain = make_model("llama")
    wanted = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert float(wanted.max()) == pytest.approx(8.0)
    assert torch.allclose(torch.from_numpy(layout.constants["rope_freqs.weight"]), wanted, rtol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
