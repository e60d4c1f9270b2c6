"""A quantised layer is the layer on its dequantised weight, in forward and backward, now and after evaluations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from tiny_runs import assert_close, assert_equal, lively_model, make_samples, move_adapters

from qingtune.adapters.lora import LoRALinear, add_lora, lora_layers
from qingtune.data.batch import Batch, collate
from qingtune.kernels import linear
from qingtune.kernels.linear import Int8Linear, NF4Linear, QuantizedLinear, import_bitsandbytes, quantized_class
from qingtune.kernels.loss import summed_loss
from qingtune.models.layers import linear_layers, replace_layer
from qingtune.models.quantize import quantize_model

KINDS = [NF4Linear, Int8Linear]
# Out and in features: whole blocks of 64, rows that end within a block, a weight smaller than a block, a single number.
SHAPES = [(64, 128), (33, 65), (7, 13), (6, 34), (5, 1), (1, 1), (96, 200), (48, 96), (80, 16)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes compiles its way of dequantising rows of odd length, for 15 s; it computes the same without."""
    from bitsandbytes.backends.default import ops

    monkeypatch.setattr(ops, "_dequantize_4bit_compute", ops._dequantize_4bit_compute.__wrapped__)


def make_weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_linear_on_dequantised_weight(
    kind: type[QuantizedLinear], bias: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    own_bias = make_weight((1, shape[0]), dtype)[0] if bias else None
    layer = kind(make_weight(shape, dtype), own_bias)
    weight = layer.dequantize(dtype)
    assert weight.shape == shape
    assert weight.dtype == dtype
    inputs = [torch.randn(3, 4, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    mine, plain = (x.requires_grad_() for x in inputs)
    y, wanted = layer(mine), F.linear(plain, weight, own_bias)
    assert y.dtype == dtype
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(towards)
    wanted.backward(towards)
    bound = 1e-6 if dtype == torch.float32 else 1e-2  # bf16 keeps 8 bits: a rounding or two apart
    assert mine.grad is not None
    assert plain.grad is not None
    assert_close({"y": y.detach(), "dx": mine.grad}, {"y": wanted.detach(), "dx": plain.grad}, share=bound)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_error_is_within_half_a_step_of_its_block(shape: tuple[int, int]) -> None:
    weight = make_weight(shape, torch.float32)
    layer = NF4Linear(weight, None)
    error = (layer.dequantize(torch.float32) - weight).flatten()
    place = torch.empty(shape)
    assert (layer.dequantize(torch.float32, place) - weight).flatten().equal(error)
    padded = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = padded.abs().amax(1, keepdim=True).expand_as(padded).flatten()[: weight.numel()]
    # NF4's widest gap, from -1 to -0.696, has a half of 0.152. The second quantisation moves a block's scale by less
    # than 1 % of the largest of 256 blocks' scales.
    assert bool((error.abs() <= 0.153 * largest + 0.01 * largest.max()).all())
    if weight.numel() > 1000:
        assert float(error.norm() / weight.norm()) < 0.11  # 0.09 for normal weights; 0.30 with 2 bits less


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_error_is_within_half_a_step_of_its_row(shape: tuple[int, int]) -> None:
    weight = make_weight(shape, torch.float32)
    weight[0] *= 1000  # an outlier row must not cost the others their bits
    error = (Int8Linear(weight, None).dequantize(torch.float32) - weight).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_weight_stays_zero(kind: type[QuantizedLinear]) -> None:
    assert not kind(torch.zeros(8, 64), None).dequantize(torch.float32).any()


def qlora_model(bits: int, kind: str) -> Any:
    model = lively_model(kind)
    quantize_model(model, bits, torch.device("cpu"))
    add_lora(model, None, r=4, alpha=8, dropout=0.0)
    move_adapters(model)
    return model


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed_loss(model, batch, plain_head=True).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 2 * len(lora_layers(model))
    return found


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_after_evaluations_are_those_before(bits: int, kind: str) -> None:
    model, batch = qlora_model(bits, kind), collate(make_samples())
    before = gradients(model, batch)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            summed_loss(model, batch, plain_head=True)
    with torch.inference_mode():
        model(input_ids=batch.token_ids[None])
    model.train()
    assert_equal(gradients(model, batch), before)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_equals_lora_on_dequantised_model(bits: int, kind: str) -> None:
    model, batch = qlora_model(bits, kind), collate(make_samples())
    dense = copy.deepcopy(model)
    for name, adapter in lora_layers(dense).items():
        base = adapter.base
        assert isinstance(base, QuantizedLinear)
        plain = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        plain.requires_grad_(False)
        plain.weight.copy_(base.dequantize(torch.float32))
        if base.bias is not None:
            plain.bias.copy_(base.bias)
        replace_layer(dense, f"{name}.base", plain)
    assert_close(gradients(model, batch), gradients(dense, batch), share=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_head_and_embedding_stay_dense_and_layers_keep_their_way_round(kind: str) -> None:
    plain = make_model(kind)
    model = copy.deepcopy(plain)
    quantize_model(model, 8, torch.device("cpu"))
    layers = linear_layers(model)
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=5e-3)


def test_layer_of_each_bit_count() -> None:
    kinds = [type(quantized_class(bits)(make_weight((4, 64), torch.float32), None)) for bits in (4, 8)]
    assert kinds == KINDS


def test_adapter_on_quantised_layer_starts_as_its_base() -> None:
    layer = NF4Linear(make_weight((8, 64), torch.float32), None)
    adapter = LoRALinear(layer, torch.randn(4, 64), torch.zeros(8, 4), 2.0, 0.5)
    x = torch.ones(2, 64)
    assert torch.equal(adapter(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 66), (128, 896), (3, 7)])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_put_in_a_given_place_are_the_same(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = quantized_class(bits)(torch.randn(shape).to(dtype), None)
    place = torch.full(shape, torch.nan, dtype=dtype)
    found = layer.dequantize(dtype, place)
    assert found.equal(layer.dequantize(dtype))
    assert found is place or shape[1] % 2  # an odd row is beyond the library's fast kernel


@pytest.mark.parametrize("shape", [(96, 128), (7, 50), (3, 1)])
def test_weights_packed_a_piece_at_a_time_are_packed_as_whole_ones(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.bfloat16)
    whole = import_bitsandbytes().functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    in_8_bits = Int8Linear.pack(weight)
    monkeypatch.setattr(linear, "NUMBERS_PACKED_AT_A_TIME", 128)
    in_4_bits = NF4Linear.pack(weight)
    for name, tensor in {"packed": whole[0], **whole[1].as_dict(packed=True)}.items():
        assert torch.equal(in_4_bits[name], tensor), name
    for name, tensor in Int8Linear.pack(weight).items():
        assert torch.equal(tensor, in_8_bits[name]), name
