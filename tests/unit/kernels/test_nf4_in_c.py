"""NF4 weights unpacked in C are bit for bit what the same operations give in PyTorch, at each width of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qingtune.kernels.linear import NF4Linear, import_bitsandbytes
from qingtune.kernels.native import nf4, products
from qingtune.kernels.native.build import compiled_library
from qingtune.kernels.native.elementwise import ELEMENTS_A_THREAD
from qingtune.kernels.projection import Member, Projection
from qingtune.kernels.workspace import Workspace

FOUND = nf4.nf4_library()
pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
# The machine's own vectors, AVX2's, and none.
WIDTHS = {"own": (), "avx2": ("-mno-avx512f",), "none": ("-mno-avx512f", "-mno-avx2")}
# A number, less than a block and more, rows that divide into blocks and do not, enough for two threads.
SHAPES = [(1, 1), (3, 7), (1, 63), (64, 64), (5, 24), (7, 200), (67, 2 * ELEMENTS_A_THREAD // 64)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled_library(nf4.SOURCE, nf4._declare, (*nf4.FLAGS, *WIDTHS[request.param]))
    if isinstance(library, str):
        pytest.skip(library)
    monkeypatch.setattr(nf4, "_library", lambda: library)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer_of(shape: tuple[int, int], dtype: torch.dtype, *, nested: bool) -> NF4Linear:
    """Blocks of many sizes, one of zeros; its scales quantised as well or not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.linspace(0, 9, shape[0])[:, None].exp()
    weight.flatten()[64:128] = 0
    layer = NF4Linear(weight.to(dtype), None)
    if not nested:
        functional = import_bitsandbytes().functional
        packed, state = functional.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4")
        layer = NF4Linear.restore(shape, {"packed": packed, **state.as_dict(packed=True)}, None)
    assert layer.state.nested == nested
    return layer


def twin(layer: NF4Linear) -> torch.Tensor:
    """Codes looked up, times their block's scale, rounded to the state's dtype."""
    state: Any = layer.state
    scales = state.absmax
    if state.nested:
        of_blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.int()] * of_blocks + state.offset
    codes = torch.stack([layer.packed.flatten() >> 4, layer.packed.flatten() & 15], 1).flatten()
    numbers = layer.out_features * layer.in_features
    wide = state.code[codes.int()][:numbers] * scales.repeat_interleave(state.blocksize)[:numbers]
    return wide.to(state.dtype).view(layer.out_features, layer.in_features)


@DTYPES
@pytest.mark.usefixtures("width", "threads")
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain scales"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_pytorch_unpacks_and_nothing_beyond(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    layer = layer_of(shape, dtype, nested=nested)
    room = torch.full((shape[0] * shape[1] + 64,), 7, dtype=dtype)
    out = room[: shape[0] * shape[1]].view(shape)
    assert nf4.fits(layer.state, out)
    assert layer.dequantize(dtype, out) is out
    assert torch.equal(out, twin(layer))
    assert bool((room[shape[0] * shape[1] :] == 7).all())


@DTYPES
def test_without_a_compiler_it_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((48, 192), dtype, nested=True)
    in_c = layer.dequantize(dtype, torch.empty(48, 192, dtype=dtype))
    monkeypatch.setattr(nf4, "_library", lambda: None)
    out = torch.empty(48, 192, dtype=dtype)
    assert layer.dequantize(dtype, out) is out
    assert torch.equal(out, in_c)


def test_what_it_cannot_write_goes_another_way() -> None:
    layer = layer_of((8, 64), torch.bfloat16, nested=True)
    wide, across = torch.empty(8, 64), torch.empty(64, 8, dtype=torch.bfloat16).t()
    assert not nf4.fits(layer.state, across)
    assert torch.equal(layer.dequantize(torch.float32, wide), twin(layer).float())  # rounded to the state's dtype first


@pytest.mark.skipif(isinstance(products.products_library(), str), reason="no products with weights as stored")
def test_a_layer_stored_in_4_bits_is_a_dense_one_in_16_bits_and_never_wide() -> None:
    """In fp32: bit for bit, forward and backward, in the memory of the weight in 16 bits alone."""
    layer, dense = layer_of((96, 128), torch.bfloat16, nested=True), torch.nn.Linear(128, 96, bias=False)
    dense.weight = torch.nn.Parameter(twin(layer), requires_grad=False)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(9, width, generator=generator) for width in (128, 96))
    results: list[torch.Tensor] = []
    for base in (layer, dense):
        workspace = Workspace(torch.device("cpu"))
        projection = Projection([Member(base, None)], 0.0, workspace, int8_units=False)
        out, grad_x = torch.empty(9, 96), torch.empty(9, 128)
        projection.forward("layer", x, [out], None)
        projection.backward("layer", x, [grad], grad_x, None)
        results += [out, grad_x]
        assert workspace.held_bytes() == (2 * 96 * 128 if base is layer else 0)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
