"""int8 products in C are those of the integers, whatever units they are compiled for."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from native_twin import VARIANTS, Variant

from qingtune.kernels.native import int8_products
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units

# Rows, and in and out features: whole tiles, panels and chunks, and less or more than those.
SHAPES = [(1, 1, 1), (5, 7, 33), (14, 64, 32), (29, 130, 70), (15, 3001, 100), (100, 258, 1500)]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """Products are compiled for these units."""
    found: Variant = request.param
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    flags = (*flags_of_hidden_units(), *found.flags)
    library = compiled_library(int8_products.SOURCE, int8_products.declare, flags)
    if isinstance(library, str):
        pytest.skip(library)
    monkeypatch.setattr(int8_products, "_library", lambda: library)
    return found


def _int8(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def _sizes(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def _product(
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None,
    out: torch.Tensor,
    *,
    add: bool = False,
) -> torch.Tensor:
    assert int8_products.fits(packed, weight, out)
    room = torch.empty(int8_products.room_bytes(*packed.shape), dtype=torch.uint8)
    int8_products.multiply(packed, scales, weight, columns, out, room, add=add)
    return out


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "deep", "wide"), SHAPES)
def test_products_are_those_of_the_integers(rows: int, deep: int, wide: int, dtype: torch.dtype) -> None:
    packed, scales, columns = _int8(rows, deep, seed=1), _sizes(rows, 1, seed=2), _sizes(wide, seed=3)
    there = torch.randn(rows, wide, generator=torch.Generator().manual_seed(4)).to(dtype)
    for weight in (_int8(deep, wide, seed=5), _int8(wide, deep, seed=6).t()):
        exact = packed.double() @ weight.double() * scales.double()
        close: dict[str, Any] = {"rtol": 2e-7 if dtype == torch.float32 else 2**-8, "atol": 0.0}
        found = _product(packed, scales, weight, None, torch.full_like(there, torch.nan))
        torch.testing.assert_close(found.double(), exact, **close)
        found = _product(packed, scales, weight, columns, torch.full_like(there, torch.nan))
        torch.testing.assert_close(found.double(), exact * columns.double(), **close)
        found = _product(packed, scales, weight, columns, there.clone(), add=True)
        close["atol"] = float(exact.abs().max()) * close["rtol"]  # a sum of two may be small
        torch.testing.assert_close(found.double(), there.double() + exact * columns.double(), **close)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("signs", [(127, 127), (127, -128), (-128, -128)])
def test_the_largest_sums_are_exact(signs: tuple[int, int]) -> None:
    packed = torch.full((15, 4864), signs[0], dtype=torch.int8)
    weight = torch.full((4864, 40), signs[1], dtype=torch.int8)
    found = _product(packed, torch.ones(15, 1), weight, None, torch.empty(15, 40))
    assert (found == float(4864 * signs[0] * signs[1])).all()


@pytest.mark.usefixtures("variant")
def test_threads_and_gaps_between_rows_change_nothing() -> None:
    packed, scales, weight = _int8(59, 130, seed=1), _sizes(59, 1, seed=2), _int8(130, 300, seed=3)
    alone, before = _product(packed, scales, weight, None, torch.empty(59, 300)), torch.get_num_threads()
    wide = torch.zeros(59, 320)
    try:
        for threads in (2, 3, 4, 7, 40):
            torch.set_num_threads(threads)
            assert torch.equal(_product(packed, scales, weight, None, torch.empty(59, 300)), alone)
            assert torch.equal(_product(packed, scales, weight, None, wide[:, 10:310]), alone)
    finally:
        torch.set_num_threads(before)
    assert not wide[:, :10].any()
    assert not wide[:, 310:].any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_scale_is_no_number_gives_none(dtype: torch.dtype) -> None:
    scales = torch.tensor([[1.0], [torch.nan], [2.0]])
    scales.view(torch.int32)[1] = 0x7FFFFFFF  # which would be rounded up to -0 in bf16
    found = _product(_int8(3, 20, seed=1), scales, _int8(20, 35, seed=2), None, torch.empty(3, 35, dtype=dtype))
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("fpu sse2", "AVX2"),
        ("avx2 fma f16c avx512f avx512bw", "without VNNI"),
        ("avx2 fma f16c avx512f avx512_vnni amx_int8", "AMX"),
        ("avx2 fma f16c", None),
        ("avx2 fma f16c avx_vnni", None),
        ("avx2 fma f16c avx512f avx512_vnni avx512_bf16", None),
    ],
)
def test_they_are_for_cpus_on_which_they_are_faster(
    flags: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ctypes.CDLL(None)
    monkeypatch.setattr("qingtune.machine.resources.cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(int8_products, "cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(int8_products, "compiled_library", lambda *_: made)
    found = int8_products.int8_products_library()
    assert found is made if reason is None else reason in str(found)
