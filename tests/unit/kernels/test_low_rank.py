"""The products of low-rank adapters in C, against fp64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from qingtune.kernels.footprint import low_rank_room
from qingtune.kernels.native import low_rank
from qingtune.kernels.native.low_rank import LowRankProducts, low_rank_library, native_low_rank

CPU = torch.device("cpu")
# Rows of activations, features, and ranks of a group: less than a vector, whole panels and blocks, more than those.
SHAPES = [
    (1, 2, [2]),
    (3, 34, [4, 2]),
    (14, 64, [16]),
    (29, 130, [30]),
    (61, 898, [64, 34, 66]),
    (801, 256, [8, 8]),
    (9, 3102, [192]),
]
DTYPES = [torch.float32, torch.bfloat16]
EXACT = {torch.float32: 2e-6, torch.bfloat16: 5e-3}  # of a result's norm: bf16 rounds results, and adapters


def _functions(dtype: torch.dtype) -> LowRankProducts:
    if isinstance(found := low_rank_library(), str):
        pytest.skip(found)
    functions = native_low_rank(dtype, CPU)
    if functions is None:
        pytest.skip("no dot products of bf16, or faster units")
    return functions


def _numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _room(deep: int, wide: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((low_rank_room(deep, wide, dtype.itemsize),), torch.nan)


def _assert_close(found: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    assert float((found.double() - exact).norm() / exact.norm()) < bound


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "ranks"), SHAPES)
def test_products_of_a_group(rows: int, features: int, ranks: list[int], dtype: torch.dtype) -> None:
    """Those with all A of a group, whose rows are the ranks, and with a B, whose columns they are."""
    c, rank = _functions(dtype), sum(ranks)
    x, low = _numbers(rows, features, seed=1, dtype=dtype), _numbers(rows, rank, seed=2, dtype=dtype)
    each_a = [_numbers(r, features, seed=3 + i) for i, r in enumerate(ranks)]
    b, a = _numbers(features, rank, seed=9), torch.cat(each_a).double()

    def reduced(matrices: list[torch.Tensor], transposed: bool) -> torch.Tensor:
        out = torch.full((rows, rank), torch.nan, dtype=dtype)
        c.reduce(x, matrices, out, _room(features, rank, dtype), transposed=transposed, scale=0.3)
        return out

    def expanded(matrices: list[torch.Tensor], transposed: bool) -> torch.Tensor:
        out = x.clone()
        c.expand(low, matrices, out, transposed=transposed, scale=-0.7)
        return out

    _assert_close(reduced(each_a, True), 0.3 * x.double() @ a.t(), EXACT[dtype])
    _assert_close(reduced([b], False), 0.3 * x.double() @ b.double(), EXACT[dtype])
    _assert_close(expanded(each_a, False), x.double() - 0.7 * low.double() @ a, EXACT[dtype])
    _assert_close(expanded([b], True), x.double() - 0.7 * low.double() @ b.double().t(), EXACT[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "ranks"), SHAPES)
def test_gradients_are_added_in_fp32(rows: int, features: int, ranks: list[int], dtype: torch.dtype) -> None:
    c, rank = _functions(dtype), sum(ranks)
    wide, low = _numbers(rows, features, seed=1, dtype=dtype), _numbers(rows, rank, seed=2, dtype=dtype)
    before = _numbers(features, rank, seed=3)
    of_b, of_a = before.clone(), list(before.t().contiguous().split(ranks))
    for _ in range(2):
        c.outer(wide, low, [of_b], 0.25)
        c.outer(low, wide, of_a, 0.25)
    exact = before.double() + 0.5 * wide.double().t() @ low.double()
    _assert_close(of_b, exact, 2e-6)
    _assert_close(torch.cat(of_a), exact.t(), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_have_gaps_between_them(dtype: torch.dtype) -> None:
    c = _functions(dtype)
    x, low = _numbers(20, 80, seed=1, dtype=dtype)[:, 6:56], torch.zeros(20, 30, dtype=dtype)
    a, total, out = _numbers(10, 50, seed=2), torch.zeros(10, 50), torch.zeros(20, 70, dtype=dtype)
    c.reduce(x, [a], low[:, 8:18], _room(50, 10, dtype), transposed=True)
    c.expand(low[:, 8:18], [a], out[:, 10:60], transposed=False)
    c.outer(low[:, 8:18], x, [total])
    _assert_close(low[:, 8:18], x.double() @ a.double().t(), EXACT[dtype])
    _assert_close(out[:, 10:60], low[:, 8:18].double() @ a.double(), EXACT[dtype])
    _assert_close(total, low[:, 8:18].double().t() @ x.double(), 2e-6)
    assert not any(part.any() for part in (low[:, :8], low[:, 18:], out[:, :10], out[:, 60:]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    c, found = _functions(dtype), []
    x, a, b = _numbers(150, 900, seed=1, dtype=dtype), _numbers(64, 900, seed=2), _numbers(66, 64, seed=3)
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        low, out = torch.empty(150, 64, dtype=dtype), torch.zeros(150, 66, dtype=dtype)
        totals = torch.zeros(64, 900), torch.zeros(900, 64)
        c.reduce(x, [a], low, _room(900, 64, dtype), transposed=True)
        c.expand(low, [b], out, transposed=True)
        c.outer(low, x, [totals[0]])
        c.outer(x, low, [totals[1]])
        found.append((low, out, *totals))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    c = _functions(dtype)
    x, a = _numbers(3, 50, seed=1, dtype=dtype), _numbers(4, 50, seed=2)
    x[1, 7], x[2, 8] = torch.nan, torch.inf
    low, total = torch.zeros(3, 4, dtype=dtype), torch.zeros(4, 50)
    c.reduce(x, [a], low, _room(50, 4, dtype), transposed=True)
    assert low[0].isfinite().all()
    assert low[1].isnan().all()
    assert not low[2].isfinite().any()
    c.outer(torch.ones(3, 4, dtype=dtype), x, [total])
    assert total[:, 7].isnan().all()
    assert total[:, 8].isinf().all()
    assert total[:, 9:].isfinite().all()


class _Library:
    """Compiled for a CPU with dot products of bf16, or not."""

    def __init__(self, bf16: bool) -> None:
        self.takes_bf16 = lambda: int(bf16)


@pytest.mark.parametrize(
    ("compiled", "flags", "takes"),
    [(True, {"avx512_bf16"}, True), (True, {"avx512_bf16", "amx_bf16"}, False), (False, {"avx512_bf16"}, False)],
    ids=["dot products", "units for tiles", "an old compiler"],
)
def test_bf16_only_where_dot_products_of_it_are_compiled_and_nothing_is_faster(
    compiled: bool, flags: set[str], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "cpu_flags", lambda: flags)
    functions = LowRankProducts(cast("ctypes.CDLL", _Library(compiled)))
    monkeypatch.setattr(low_rank, "low_rank", lambda: functions)
    assert (native_low_rank(torch.bfloat16, CPU) is functions) == takes
    assert native_low_rank(torch.float32, CPU) is functions
    assert native_low_rank(torch.float64, CPU) is native_low_rank(torch.float32, torch.device("cuda")) is None
