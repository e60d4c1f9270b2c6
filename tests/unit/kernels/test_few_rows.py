"""bf16 products of a few rows are those of fp64, rounded once."""

from __future__ import annotations

import pytest
import torch

from qingtune.kernels.native import few_rows
from qingtune.kernels.native.few_rows import MOST, few_rows_library
from qingtune.kernels.workspace import Workspace

# Rows of x, numbers summed over, numbers of a row: whole and parts of tiles, panels, and visits of the sums.
SHAPES = [(1, 32, 64), (5, 96, 128), (6, 256, 64), (13, 320, 448), (48, 704, 320), (MOST, 544, 576)]
ROUNDED = 2**-8  # half a unit in the last place of bf16, as a share


@pytest.fixture
def in_c() -> None:
    if isinstance(found := few_rows_library(), str):
        pytest.skip(found)


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _weights(deep: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As it lies in memory, and the transpose of such a one; [deep, wide] both."""
    return _numbers(deep, wide, seed=3), _numbers(wide, deep, seed=4).t()


def _product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, add: bool = False, bias: torch.Tensor | None = None
) -> torch.Tensor:
    Workspace(torch.device("cpu")).multiply(x, weight, out, add=add, bias=bias)
    return out


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize(("rows", "deep", "wide"), SHAPES)
def test_products_are_rounded_once(rows: int, deep: int, wide: int) -> None:
    x, there, nan = _numbers(rows, deep, seed=1), _numbers(rows, wide, seed=2), torch.tensor(torch.nan)
    for weight in _weights(deep, wide):
        assert few_rows.fits(x, weight, there)
        exact = x.double() @ weight.double()
        for found, wanted in (
            (_product(x, weight, nan.bfloat16().repeat(rows, wide)), exact),
            (_product(x, weight, there.clone(), add=True), there + exact),
            (_product(x, weight, nan.bfloat16().repeat(rows, wide), bias=there[0]), there[0] + exact),
        ):
            torch.testing.assert_close(found.double(), wanted, rtol=ROUNDED, atol=1e-3)


@pytest.mark.usefixtures("in_c")
def test_products_do_not_depend_on_the_number_of_threads() -> None:
    x, before = _numbers(29, 704, seed=1), torch.get_num_threads()
    try:
        for weight in _weights(704, 1088):
            found = []
            for threads in (1, 2, 3, 40):
                torch.set_num_threads(threads)
                found.append(_product(x, weight, torch.empty(29, 1088, dtype=torch.bfloat16)))
            assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("in_c")
def test_rows_may_have_gaps_between_them() -> None:
    x, out = _numbers(20, 80, seed=1)[:, 5:69], torch.zeros(20, 90, dtype=torch.bfloat16)
    for weight in _weights(64, 64):
        exact = x.double() @ weight.double()
        found = _product(x, weight, out[:, 10:74]).double()
        torch.testing.assert_close(found, exact, rtol=ROUNDED, atol=1e-3)
    assert not out[:, :10].any()
    assert not out[:, 74:].any()


def test_others_are_left_to_pytorch() -> None:
    x, out = _numbers(20, 64, seed=1), torch.empty(20, 64, dtype=torch.bfloat16)
    weight = _numbers(64, 64, seed=2)
    assert not few_rows.fits(x.float(), weight.float(), out.float())
    assert not few_rows.fits(_numbers(MOST + 1, 64, seed=1), weight, torch.empty(MOST + 1, 64).bfloat16())
    assert not few_rows.fits(x, _numbers(64, 70, seed=2), torch.empty(20, 70).bfloat16())
    assert not few_rows.fits(x[:, :40], _numbers(70, 40, seed=2).t(), torch.empty(20, 70).bfloat16())
    assert not few_rows.fits(x, _numbers(128, 128, seed=2)[:64, :64], out)


@pytest.mark.usefixtures("in_c")
def test_what_is_not_finite_stays_so() -> None:
    for weight in _weights(64, 64):
        x = _numbers(3, 64, seed=1)
        x[1, 7], x[2, 8] = torch.nan, torch.inf
        found = _product(x, weight, torch.empty(3, 64, dtype=torch.bfloat16))
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
        assert not found[2].isfinite().any()
