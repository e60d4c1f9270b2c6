"""Rows are rounded to int8 within half a step; products of int8 matrices are those of the integers."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.kernels.device import has_int8_units
from qingtune.kernels.int8 import TILE, int8_product, quantize_rows
from qingtune.kernels.native import int8_products
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")
# Who multiplies. PyTorch does it rightly only where the CPU has units for it; nothing of ours asks it to elsewhere.
in_each_way = pytest.mark.parametrize(
    "in_c",
    [
        pytest.param(True, id="C", marks=pytest.mark.skipif(not int8_products.in_c(), reason="needs AVX2, no AMX")),
        pytest.param(False, id="PyTorch", marks=pytest.mark.skipif(not has_int8_units(CPU), reason="needs int8 units")),
    ],
)


def multiplied(
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None,
    out: torch.Tensor,
    *,
    in_c: bool,
    add: bool,
) -> None:
    """int8_product, in C or by PyTorch."""
    with patch.object(int8_products, "fits", lambda *_: in_c):
        int8_product(packed, scales, weight, columns, out, Workspace(CPU), add=add)


def quantized(x: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(x, columns, Workspace(CPU), "x")


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE + 5]), width=st.integers(1, 70), seed=st.integers()
)
def test_the_error_is_at_most_half_a_step(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**60)
    sizes = 10 ** (torch.rand(rows, 1, generator=generator) * 12 - 6)  # rows of very different sizes
    x = torch.randn(rows, width, generator=generator) * sizes
    columns = torch.rand(width, generator=generator) + 0.1 if seed % 2 else None
    packed, scales = quantized(x, columns)
    wanted = x.double() * (1 if columns is None else columns.double())
    assert (packed.dtype, packed.shape, scales.dtype, scales.shape) == (torch.int8, x.shape, torch.float32, (rows, 1))
    torch.testing.assert_close(scales.double(), wanted.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=0)
    assert ((packed * scales.double() - wanted).abs() <= scales.double() * 0.50002).all()
    assert (packed.abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_formats_are_rounded_as_their_fp32_values(dtype: torch.dtype) -> None:
    x, columns = torch.randn(5, 40).to(dtype), torch.rand(40)
    for mine, wide in zip(quantized(x, columns), quantized(x.float(), columns), strict=True):
        torch.testing.assert_close(mine, wide, rtol=1e-6, atol=0)


def test_rows_of_zeros_stay_zeros() -> None:
    packed, scales = quantized(torch.tensor([[0.0, -0.0], [1.0, -2.0]]))
    assert packed.tolist() == [[0, 0], [64, -127]]
    assert (scales > 0).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_value_takes_only_its_row_s_digits(sign: int) -> None:
    x = torch.rand(3, 20) + 0.1
    x[1, 7] = sign * 3e38
    packed, scales = quantized(x)
    assert packed[1].tolist() == [127 * sign if place == 7 else 0 for place in range(20)]
    alone, alone_scales = quantized(x[[0, 2]])
    assert packed[[0, 2]].equal(alone)
    assert scales[[0, 2]].equal(alone_scales)


@pytest.mark.parametrize("tiny", [1e-38, 1e-42])
def test_values_near_the_smallest_number_do_not_blow_up(tiny: float) -> None:
    packed, scales = quantized(torch.full((2, 3), tiny))
    assert (packed * scales.double() - tiny).abs().max() <= 1.2e-38


@in_each_way
@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(2, 200), st.integers(1, 40)),
    columns=st.booleans(),
    add=st.booleans(),
    transposed=st.booleans(),
)
def test_a_product_is_that_of_the_integers(
    shape: tuple[int, int, int], columns: bool, add: bool, transposed: bool, in_c: bool
) -> None:
    torch.manual_seed(sum(shape))
    t, k, n = shape
    packed, scales, factors = random_int8(t, k), torch.rand(t, 1) + 0.1, torch.rand(n) + 0.1 if columns else None
    weight = random_int8(n, k).t() if transposed else random_int8(k, n)
    before = torch.randn(t, n)
    out = before.clone() if add else torch.full((t, n), torch.nan)
    multiplied(packed, scales, weight, factors, out, in_c=in_c, add=add)
    sums = packed.double() @ weight.double()
    product = sums * scales.double() * (1 if factors is None else factors.double())
    wanted = product + before.double() if add else product
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
    if factors is None and not add:  # below 2^24 the sums are whole numbers of fp32
        exact = torch.empty(t, n)
        multiplied(packed, torch.ones(t, 1), weight, None, exact, in_c=in_c, add=False)
        assert exact.double().equal(sums)


@in_each_way
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_the_largest_sums_do_not_saturate(signs: tuple[int, int], in_c: bool) -> None:
    width = 4864
    shapes = [(3, width), (width, 5)]
    packed, weight = (
        torch.full(shape, 127 * sign, dtype=torch.int8) for shape, sign in zip(shapes, signs, strict=True)
    )
    out = torch.empty(3, 5)
    multiplied(packed, torch.ones(3, 1), weight, None, out, in_c=in_c, add=False)
    assert (out == float(width * 127**2 * signs[0] * signs[1])).all()


@in_each_way
@pytest.mark.parametrize("add", [False, True])
def test_bf16_results_are_rounded_once(add: bool, in_c: bool) -> None:
    packed, scales, weight, before = (
        random_int8(9, 64),
        torch.rand(9, 1),
        random_int8(64, 7),
        torch.randn(9, 7).bfloat16(),
    )
    out = before.clone()
    multiplied(packed, scales, weight, None, out, in_c=in_c, add=add)
    product = (packed.double() @ weight.double()) * scales.double()
    wanted = product + before.double() if add else product
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-6)


@in_each_way
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_what_is_not_finite_stays_so(bad: float, columns: bool, add: bool, in_c: bool) -> None:
    x = torch.randn(TILE + 3, 16)
    x[1, 3] = x[TILE + 1, 0] = bad
    packed, scales = quantized(x, torch.rand(16) + 0.1 if columns else None)
    out = torch.zeros(TILE + 3, 6)
    multiplied(packed, scales, random_int8(16, 6), torch.ones(6), out, in_c=in_c, add=add)
    hurt = ~out.isfinite()
    assert hurt[[1, TILE + 1]].all()
    assert hurt.sum() == 2 * 6


def test_rows_quantised_under_other_names_stay() -> None:
    workspace = Workspace(CPU)
    one, two = torch.randn(200, 9), torch.randn(300, 9)
    kept = quantize_rows(one, None, workspace, "one")
    quantize_rows(two, None, workspace, "two")
    for mine, alone in zip(kept, quantized(one), strict=True):
        assert mine.equal(alone)
