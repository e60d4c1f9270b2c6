"""A GGUF file holds what it was made of, and one that does not is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from qingtune.errors import UserError
from qingtune.export import gguf_file
from qingtune.export.gguf_file import KINDS, MOST_ERROR, GGUFPlan, check_gguf, write_gguf
from qingtune.export.gguf_layout import PlacedTensor, layout_of
from qingtune.models.stored_weights import StoredWeights

Read = Callable[[str], torch.Tensor]


@pytest.fixture
def model(tmp_path: Path) -> tuple[GGUFPlan, Read]:
    """A tiny llama with a head of its own, in bf16, as a plan for an fp32 file."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    weights = StoredWeights(tmp_path)
    layout = layout_of(tmp_path, weights.shapes)
    metadata: dict[str, Any] = {"general.name": "tiny", **layout.metadata, "tokenizer.ggml.tokens": ["a", "面"]}
    return GGUFPlan(layout, metadata, "f32"), weights.read


@pytest.mark.parametrize("quantize", KINDS)
def test_written_and_read_back(quantize: str, model: tuple[GGUFPlan, Read], tmp_path: Path) -> None:
    plan, read = replace(model[0], quantize=quantize), model[1]
    write_gguf(tmp_path / "m.gguf", plan, read)
    errors = {Kind[kind]: kept.error for kind, kept in check_gguf(tmp_path / "m.gguf", plan, read).items()}
    form = KINDS[quantize]
    assert set(errors) == {Kind.F32, form} | ({Kind.Q8_0} if form == Kind.Q4_0 else set())
    assert errors[Kind.F32] == 0
    if form in (Kind.F16, Kind.BF16):  # the weights are bf16, and small numbers lose bits in f16
        assert errors[form] <= 2.0**-12
    if form in (Kind.Q8_0, Kind.Q4_0):
        assert MOST_ERROR[form] / 10 < errors[form] < MOST_ERROR[form]
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == Kind.F32
    assert kinds["output.weight"] == kinds["token_embd.weight"] == (Kind.Q8_0 if form == Kind.Q4_0 else form)
    assert kinds["blk.1.ffn_down.weight"] == form


def test_rows_that_do_not_divide_into_blocks_stay_in_16_bits(tmp_path: Path) -> None:
    make_model("qwen2", hidden_size=48).save_pretrained(tmp_path)
    weights = StoredWeights(tmp_path)
    layout = layout_of(tmp_path, weights.shapes)
    plan = GGUFPlan(layout, layout.metadata, "q4_0")
    write_gguf(tmp_path / "m.gguf", plan, weights.read)
    check_gguf(tmp_path / "m.gguf", plan, weights.read)
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == Kind.F16
    assert kinds["blk.0.ffn_down.weight"] == Kind.Q4_0
    assert {name for name, kind in kinds.items() if kind == Kind.F16} == set(plan.undivided)
    assert GGUFPlan(layout, layout.metadata, "bf16").undivided == []


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", ["normal", "heavy tails", "one large value"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.BF16])
def test_rounding_stays_within_its_bound(kind: Kind, shape: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 256, generator=generator)
    if shape == "heavy tails":
        tensor = tensor / torch.randn(64, 256, generator=generator)
    if shape == "one large value":
        tensor[:, ::32] = 300.0
    tensor = (tensor * size).clamp(-6e4, 6e4)
    stored = gguf_file.dequantize(gguf_file._encode(tensor, kind), kind)
    error = float(np.linalg.norm(stored - tensor.numpy()) / torch.linalg.norm(tensor))
    assert 0 < error <= MOST_ERROR[kind]


def test_tensors_converted_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    whole = gguf_file._encode(tensor, Kind.Q8_0)
    monkeypatch.setattr(gguf_file, "_AT_A_TIME", 7 * 64)
    assert np.array_equal(gguf_file._encode(tensor, Kind.Q8_0), whole)


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_numbers_too_large_for_16_bits_are_found(value: float, model: tuple[GGUFPlan, Read], tmp_path: Path) -> None:
    plan = replace(model[0], quantize="f16")

    def read(name: str) -> torch.Tensor:
        tensor = model[1](name)
        if name.endswith("0.mlp.up_proj.weight"):
            tensor[3, 5] = value
        return tensor

    write_gguf(tmp_path / "m.gguf", plan, read)
    with pytest.raises(UserError, match=r"up_proj.weight stored as F16 differs .* bf16"):
        check_gguf(tmp_path / "m.gguf", plan, read)


def test_a_file_that_is_not_what_it_should_be_is_found_out(model: tuple[GGUFPlan, Read], tmp_path: Path) -> None:
    plan, read = model
    path = tmp_path / "m.gguf"
    write_gguf(path, plan, read)

    def other(name: str) -> torch.Tensor:
        return read(name).float() * (1.01 if name == "model.layers.1.self_attn.q_proj.weight" else 1.0)

    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight .* differs by 0.990%"):
        check_gguf(path, plan, other)
    for name, value in {"general.name": "x", "llama.rope.freq_base": 1.0, "tokenizer.ggml.tokens": ["b"]}.items():
        with pytest.raises(UserError, match=f"{name} in the file differs"):
            check_gguf(path, replace(plan, metadata={**plan.metadata, name: value}), read)
    fewer = replace(plan.layout, tensors=plan.layout.tensors[:-1])
    with pytest.raises(UserError, match="the tensors in the file differ"):
        check_gguf(path, replace(plan, layout=fewer), read)
    with pytest.raises(UserError, match="differ from those that were written"):
        check_gguf(path, replace(plan, quantize="f16"), read)


def test_rows_in_the_wrong_order_are_found_out(
    model: tuple[GGUFPlan, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, read = model
    with monkeypatch.context() as context:
        context.setattr(PlacedTensor, "arrange", lambda _, tensor: tensor)
        write_gguf(tmp_path / "m.gguf", plan, read)
    with pytest.raises(UserError, match=r"(q|k)_proj.weight .* differs"):
        check_gguf(tmp_path / "m.gguf", plan, read)


def test_one_tensor_is_held_at_a_time(
    model: tuple[GGUFPlan, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, read = model
    order: list[str] = []

    def watched(name: str) -> torch.Tensor:
        order.append("read")
        return read(name)

    write = gguf_file._append

    def write_one(file: Any, tensor: Any, alignment: int) -> None:
        order.append("written")
        write(file, tensor, alignment)

    monkeypatch.setattr(gguf_file, "_append", write_one)
    write_gguf(tmp_path / "m.gguf", plan, watched)
    assert order == ["read", "written"] * len(plan.layout.tensors)
