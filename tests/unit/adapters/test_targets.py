"""Linear layers are found and matched by name; the head is never among them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.names import match_names
from qingtune.errors import UserError
from qingtune.models.layers import dense_weight, linear_layers, replace_layer

KINDS = {
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_found_in_order(kind: str) -> None:
    model = make_model(kind)
    layers = linear_layers(model)
    assert [name.rsplit(".", 1)[-1] for name in layers] == list(KINDS[kind]) * 2
    assert all(layer is model.get_submodule(name) for name, layer in layers.items())
    assert match_names(list(layers), None) == list(layers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_head_is_left_out_tied_or_not(kind: str, tied: bool) -> None:
    model = make_model(kind, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head not in linear_layers(model).values()
    assert not any("lm_head" in name for name in linear_layers(model))


def test_gpt2s_transposed_layers_count_as_linear() -> None:
    model = make_model("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    assert linear_layers(model)["transformer.h.0.mlp.c_fc"] is layer
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense_weight(layer), layer.bias))


@pytest.mark.parametrize(
    ("names", "matched"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
        (
            ["mlp.down_proj", "layers.0.self_attn.v_proj", "down_proj"],
            ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
        ),
    ],
)
def test_names_match_last_parts_and_longer_ends(names: list[str], matched: list[str]) -> None:
    assert match_names(list(linear_layers(make_model("qwen2"))), names) == matched


@pytest.mark.parametrize("name", ["proj", "self_attn", "_proj", "ayers.0.self_attn.q_proj", "lm_head", "q_proj."])
def test_a_name_that_is_no_layers_end_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        match_names(list(linear_layers(make_model("qwen2"))), ["q_proj", name])


def test_the_error_lists_what_exists_and_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        match_names(list(linear_layers(make_model("qwen2"))), ["q_porj", "k_proj", "query"])
    message = str(caught.value)
    assert message.startswith('lora_target_modules: "q_porj", "query" matches no linear layer')
    assert "There are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj." in message
    assert message.endswith('Did you mean "q_proj"?')


def test_a_layer_is_replaced_in_its_place() -> None:
    model = make_model("qwen2")
    new = torch.nn.Linear(32, 64)
    replace_layer(model, "model.layers.1.mlp.up_proj", new)
    assert model.model.layers[1].mlp.up_proj is new
