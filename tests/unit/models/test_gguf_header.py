"""A GGUF header gives the shape of its model; head and embedding are one matrix where they differ by rounding alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from qingtune.errors import UserError
from qingtune.models.gguf_header import config_of_gguf
from qingtune.planning.blueprint import read_blueprint

VOCABULARY, HIDDEN = 96, 64


def write(
    path: Path, architecture: str = "qwen2", head: str = "none", experts: int = 0, key_heads: int | list[int] = 2
) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(VOCABULARY)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * VOCABULARY)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(key_heads)
    writer.add_context_length(512)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    draw = np.random.default_rng(0)
    embedding = draw.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    other = draw.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    kind = GGMLQuantizationType.Q4_0
    writer.add_tensor("token_embd.weight", quantize(embedding, kind), raw_dtype=kind)
    if head != "none":
        writer.add_tensor("output.weight", embedding if head == "same" else other)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("head", "tied"), [("none", True), ("same", True), ("other", False)])
def test_shape_and_ties(head: str, tied: bool, tmp_path: Path) -> None:
    config = config_of_gguf(write(tmp_path / "m.gguf", head=head))
    assert config == {
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": VOCABULARY, "model_type": "qwen2",
        "tie_word_embeddings": tied, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    blueprint = read_blueprint(tmp_path / "m.gguf")
    assert (blueprint.stored_itemsize, blueprint.vocabulary, blueprint.layers) == (2, VOCABULARY, 2)


def test_llama_with_experts_is_mixtral(tmp_path: Path) -> None:
    config = config_of_gguf(write(tmp_path / "m.gguf", "llama", experts=4))
    assert config["model_type"] == "mixtral"
    assert read_blueprint(tmp_path / "m.gguf").experts == 2 * 4 * 3 * HIDDEN * 128


def test_sizes_that_differ_by_layer_are_told_not_miscounted(tmp_path: Path) -> None:
    config = config_of_gguf(write(tmp_path / "m.gguf", key_heads=[2, 1]))
    assert config["num_key_value_heads"] == [2, 1]
    with pytest.raises(UserError, match=r"m\.gguf: (no model can be created from|this configuration)"):
        read_blueprint(tmp_path / "m.gguf")


@pytest.mark.parametrize("length", [0, 3, 8, 30, 200, 1000])
def test_a_file_that_is_cut_off_is_refused(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="header of this GGUF file cannot be read") as caught:
        config_of_gguf(path)
    assert str(path) in str(caught.value)


def test_lengths_that_no_file_has_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[24:32] = (2**62).to_bytes(8, "little")  # the length of the first name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cut off"):
        config_of_gguf(path)
