"""fp32 products with weights as they are stored are those of PyTorch on the widened weight."""

from __future__ import annotations

import pytest
import torch

from qingtune.kernels.native import products
from qingtune.kernels.native.products import products_library
from qingtune.kernels.workspace import Workspace

# Rows of x, and in and out features: whole panels and blocks, and less or more than those.
SHAPES = [(1, 1, 1), (5, 7, 33), (14, 32, 64), (29, 50, 70), (31, 385, 128), (100, 900, 300)]
STORED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def in_c() -> None:
    if isinstance(found := products_library(), str):
        pytest.skip(found)


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool = False, bias: torch.Tensor | None = None
) -> torch.Tensor:
    Workspace(torch.device("cpu")).multiply(x, weight, out, add=add, bias=bias)
    return out


def _assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Up to what sums of a thousand products in fp32 are off."""
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("rows", "deep", "wide"), SHAPES)
def test_products_are_those_of_the_widened_weight(rows: int, deep: int, wide: int, stored: torch.dtype) -> None:
    x, there = _numbers(rows, deep, seed=1), _numbers(rows, wide, seed=2)
    for weight in (_numbers(deep, wide, seed=3).to(stored), _numbers(wide, deep, seed=4).to(stored).t()):
        assert products.fits(x, weight, there)
        exact = x.double() @ weight.double()
        _assert_close(_product(x, weight, torch.full_like(there, torch.nan)), exact)
        _assert_close(_product(x, weight, there.clone(), add=True), there + exact)
        _assert_close(_product(x, weight, torch.full_like(there, torch.nan), bias=there[0]), there[0] + exact)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("stored", STORED[1:])
def test_a_weight_in_16_bits_gives_bit_for_bit_what_it_gives_in_fp32(stored: torch.dtype) -> None:
    x, weight = _numbers(29, 385, seed=1), _numbers(70, 385, seed=2).to(stored)
    y, wide = (_product(x, w.t(), torch.empty(29, 70)) for w in (weight, weight.float()))
    assert torch.equal(y, wide)
    back, wide = (_product(y, w, torch.empty(29, 385)) for w in (weight, weight.float()))
    assert torch.equal(back, wide)


@pytest.mark.usefixtures("in_c")
def test_products_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, before = _numbers(29, 900, seed=1), _numbers(900, 700, seed=2), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            found.append(_product(x, weight, torch.empty(29, 700)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("in_c")
def test_rows_may_have_gaps_between_them() -> None:
    x, out = _numbers(20, 80, seed=1)[:, 5:55], torch.zeros(20, 90)
    weight = _numbers(50, 40, seed=2).bfloat16()
    _assert_close(_product(x, weight, out[:, 10:50]), x.double() @ weight.double())
    assert not out[:, :10].any()
    assert not out[:, 50:].any()


def test_what_is_not_finite_stays_so() -> None:
    x, weight = _numbers(3, 50, seed=1), _numbers(50, 40, seed=2)
    x[1, 7], x[2, 8] = torch.nan, torch.inf
    found = _product(x, weight, torch.empty(3, 40))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert not found[2].isfinite().any()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_compiler_pytorch_multiplies(dtype: torch.dtype, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_library", lambda: None)
    assert not products.reads_as_stored(torch.float32, torch.device("cpu"))
    x, out = _numbers(9, 20, seed=1).to(dtype), _numbers(9, 30, seed=2).to(dtype)
    for weight in (_numbers(20, 30, seed=3).bfloat16(), _numbers(30, 20, seed=4).bfloat16().t()):
        exact = (out if add else 0) + x.double() @ weight.double()
        found = _product(x, weight, out.clone(), add=add)
        assert found.dtype == dtype
        assert (found - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()
