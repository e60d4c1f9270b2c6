"""Packed matrices multiply as the weights they stand for, and stand for weights near the true ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_twin import stands_for

from qingtune.answering.decoder import packed
from qingtune.answering.decoder.packed import DenseMatrix, Int4Matrix, Int8Matrix, pack
from qingtune.kernels.device import has_int8_units
from qingtune.kernels.workspace import Workspace
from qingtune.machine.resources import cpu_has_bf16

CPU = torch.device("cpu")
SHAPES = [(128, 64), (100, 96), (1, 32), (65, 320)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNITS = has_int8_units(CPU)
# PyTorch packs 4 bits otherwise where there is no AVX-512, and packs bf16 only where the CPU multiplies it.
NEEDS_INT4 = pytest.mark.skipif(not packed.has_int4_kernels(), reason="needs PyTorch's kernels for 4 bits")
IN_BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not cpu_has_bf16(), reason="needs a CPU that multiplies bf16")
)
IN_4_BITS = pytest.param(4, marks=NEEDS_INT4)


def packed_of(
    weight: torch.Tensor, bits: int | None, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> packed.Matrix:
    return pack(weight, bias, bits, dtype, Workspace(CPU), int8_units=UNITS)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40, 120])
@pytest.mark.parametrize("bits", [IN_4_BITS, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_unpacked_weight(shape: tuple[int, int], bits: int, rows: int, biased: bool) -> None:
    weight, bias, x = random(*shape), random(shape[0], seed=1) if biased else None, random(rows, shape[1], seed=2)
    matrix = packed_of(weight, bits, bias)
    wanted = x @ stands_for(weight, bits).t() + (0 if bias is None else bias)
    found, added = matrix.multiply(x), random(rows, shape[0], seed=3)
    # Rounded is what it is multiplied with: to steps of 1/255 of a row's range, or, where a few rows are not, to bf16.
    rounds = rows < packed.UNPACK_FROM[bits] or (bits == 8 and UNITS)
    close = float(wanted.abs().max()) / 50 if rounds else 1e-4
    torch.testing.assert_close(found, wanted, atol=close, rtol=1e-4)
    torch.testing.assert_close(matrix.multiply(x, added), wanted + added, atol=close, rtol=1e-4)


@pytest.mark.skipif(not UNITS, reason="needs int8 units")
def test_each_row_is_rounded_by_a_scale_of_its_own() -> None:
    weight, x = random(100, 96), random(5, 96, seed=2) * torch.tensor([1e-3, 1, 0, 1e4, 1])[:, None]
    found, wanted = packed_of(weight, 8).multiply(x), x @ stands_for(weight, 8).t()
    for one, two in zip(found, wanted, strict=True):
        assert float((one - two).abs().max()) <= 0.02 * float(two.abs().max())
    alone = packed_of(weight, 8).multiply(x[:1])
    torch.testing.assert_close(alone[0], found[0], atol=0.02 * float(wanted[0].abs().max()), rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, IN_BF16])
def test_dense_product(rows: int, dtype: torch.dtype) -> None:
    weight, bias, x = random(100, 96), random(100, seed=1), random(rows, 96, seed=2)
    matrix, added = packed_of(weight, None, bias, dtype), random(rows, 100, seed=3)
    close: Any = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}
    wanted = x @ weight.t() + bias
    torch.testing.assert_close(matrix.multiply(x.to(dtype)).float(), wanted, **close)
    torch.testing.assert_close(matrix.multiply(x.to(dtype), added.to(dtype)).float(), wanted + added, **close)


def test_a_dense_product_in_16_bits_without_16_bit_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses to reorder the weight there; a user can still ask for the dtype."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    weight, x = random(100, 96), random(3, 96, seed=2)
    matrix = packed_of(weight, None, None, torch.bfloat16)
    torch.testing.assert_close(matrix.multiply(x.bfloat16()).float(), x @ weight.t(), atol=0.2, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 40])
def test_8_bits_without_units_round_a_few_rows_to_bf16_and_many_to_nothing(rows: int) -> None:
    weight, x = random(100, 96), random(rows, 96, seed=2)
    matrix = pack(weight, None, 8, torch.float32, Workspace(CPU), int8_units=False)
    wanted = x @ stands_for(weight, 8).t()
    close = float(wanted.abs().max()) * (2**-8 if rows < packed.UNPACK_FROM[8] else 1e-5)
    torch.testing.assert_close(matrix.multiply(x), wanted, atol=close, rtol=0)


@pytest.mark.parametrize(("bits", "name"), [(4, "_weight_int4pack_mm_for_cpu"), (8, "_weight_int8pack_mm")])
def test_packed_products_are_asked_for_in_bf16_alone(bits: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 PyTorch computes them a number at a time: 31 ms instead of 1."""
    product, seen = getattr(packed.aten, name), list[torch.dtype]()

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return product(x, *rest)

    matrix = pack(random(64, 96), None, bits, torch.float32, Workspace(CPU), int8_units=False)
    monkeypatch.setattr(packed, "aten", SimpleNamespace(**{name: watched}))
    assert matrix.multiply(random(1, 96)).dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.011)])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_packing_is_bounded(shape: tuple[int, int], bits: int, most: float) -> None:
    weight = random(*shape) * 0.02
    found = stands_for(weight, bits)
    assert 0 < float((found - weight).norm() / weight.norm()) < most


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_of_one_value_stay(bits: int) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    weight[2, 5] = -3.0
    found = packed_of(weight, bits).multiply(torch.eye(64)).t()
    assert torch.allclose(found, weight, atol=2e-3 if bits == 8 else 1.2e-2)  # scales of 4 bits are in bf16
    assert bool(torch.isfinite(found).all())


def test_4_bits_steps_lie_between_least_and_largest() -> None:
    weight = torch.linspace(1.0, 2.0, 32)[None]  # an offset that a symmetric form would waste half its numbers on
    found = stands_for(weight, 4)
    assert float((found - weight).abs().max()) <= 1 / 15 / 2 + 1e-5


def test_shapes_that_4_bits_cannot_hold_take_8() -> None:
    assert isinstance(packed_of(random(64, 48), 4), Int8Matrix)
    assert isinstance(packed_of(random(64, 64), 4), Int4Matrix)
    assert isinstance(packed_of(random(64, 64), None), DenseMatrix)


@pytest.mark.parametrize("dtype", [torch.float32, IN_BF16])
def test_bytes_held_in_4_bits(dtype: torch.dtype) -> None:
    matrix = packed_of(random(128, 128), 4, dtype=dtype)
    assert isinstance(matrix, Int4Matrix)
    a_scale_and_zero = 2 * torch.bfloat16.itemsize  # in either dtype: the product is in bf16
    assert matrix.packed.nbytes == 128**2 // 2
    assert matrix.scales_and_middles.nbytes == a_scale_and_zero * 128 * 4


@NEEDS_INT4
def test_another_layout_of_4_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed.has_int4_kernels.cache_clear()
    assert packed.has_int4_kernels()
    right = Int4Matrix.dense
    monkeypatch.setattr(Int4Matrix, "dense", lambda self: right(self).flip(1))
    packed.has_int4_kernels.cache_clear()
    assert not packed.has_int4_kernels()
    packed.has_int4_kernels.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
def test_large_weights_are_packed_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(300, 64), random(3, 64, seed=1)
    whole = packed_of(weight, bits).multiply(x)
    monkeypatch.setattr(packed, "ROWS_AT_A_TIME", 128)
    assert torch.equal(packed_of(weight, bits).multiply(x), whole)
