"""Attention in C equals plain attention at sizes that fill its tiles and at those that do not, does not depend on how
many threads there are, and sanitizers see nothing in it.

What it has in common with PyTorch's is in test_block_attention.py, which meets it in fp32 and bf16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sanitized_driver import COMPILER, check_driver
from test_block_attention import CPU, Case, backward, check_alone, errors, forward, make_case

from qingtune.kernels.architecture import Attention
from qingtune.kernels.native import attention
from qingtune.kernels.native.elementwise import FLAGS
from qingtune.kernels.workspace import Workspace
from qingtune.machine.resources import cpu_flags

HIDDEN = os.environ.get("QINGTUNE_NATIVE") == "0" or not {"avx2", "fma", "f16c"} <= cpu_flags()
pytestmark = pytest.mark.skipif(COMPILER is None or HIDDEN, reason="no C compiler, QINGTUNE_NATIVE=0, or no AVX2")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each that attention in C takes here."""
    if not attention.in_c(request.param, CPU):
        pytest.skip("a CPU that does not multiply bf16")
    return request.param


def of_both(case: Case) -> list[torch.Tensor]:
    workspace = Workspace(CPU)
    out = forward(workspace, "a", case)
    return [out, *backward(workspace, "a", case, out)]


@pytest.mark.parametrize("size", [4, 32, 40, 64, 80, 96, 128, 256])
def test_sizes_of_heads(size: int, dtype: torch.dtype) -> None:
    check_alone(make_case([70, 1, 130], 37, group=3, dtype=dtype, size=size))


@pytest.mark.parametrize("length", [1, 6, 8, 33, 47, 49, 63, 64, 65, 97, 129])
@pytest.mark.parametrize("window", [None, 20])
def test_lengths_around_those_of_tiles(length: int, window: int | None, dtype: torch.dtype) -> None:
    check_alone(make_case([length], 0, group=1, key_heads=1, dtype=dtype, window=window))
    check_alone(make_case([3, length], length, group=1, key_heads=1, dtype=dtype, window=window))


@pytest.mark.parametrize("window", [None, 30])
def test_few_rows_far_apart(window: int | None, dtype: torch.dtype) -> None:
    rows = [0, 50, 51, 149, 150, 151, 152, 290, 400, 549]
    check_alone(make_case([100, 200, 150], 100, rows, dtype=dtype, window=window))


def test_bf16_is_nearer_to_exact_gradients_than_pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([300, 280], 60, group=7, dtype=torch.bfloat16, size=64)
    case = case._replace(q=case.q * 0.3)
    if not attention.in_c(torch.bfloat16, CPU):
        pytest.skip("a CPU that does not multiply bf16")
    mine = errors(of_both(case), case)
    monkeypatch.setattr(attention, "compiled", lambda: None)
    assert all(one < 0.8 * other for one, other in zip(mine, errors(of_both(case), case), strict=True))


def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    case, threads = make_case([100, 1, 130], 37, group=3, dtype=dtype, size=32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = of_both(case)
        torch.set_num_threads(3)
        found = of_both(case)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("spoil", [lambda case: case.q, lambda case: case.k, lambda case: case.v], ids=["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(
    value: float, spoil: Callable[[Case], torch.Tensor], dtype: torch.dtype
) -> None:
    case = make_case([70], dtype=dtype)
    spoil(case)[20] = value
    out, grad_q, grad_k, _ = of_both(case)
    assert not any(x.isfinite().all() for x in (out, grad_q, grad_k))


def test_which_layers_and_numbers_it_takes() -> None:
    plain, capped = Attention(2, 1, 8, 0.5), Attention(2, 1, 8, 0.5, cap=50.0)
    assert attention.attention_kernels(plain, torch.float32, CPU)
    assert not attention.attention_kernels(capped, torch.float32, CPU)
    assert not attention.attention_kernels(plain, torch.float64, CPU)
    assert not attention.attention_kernels(plain, torch.float16, CPU)
    assert not attention.attention_kernels(plain, torch.float32, torch.device("meta"))
    assert attention.in_c(torch.float32, torch.device("meta"))
    assert not attention.in_c(torch.float32, torch.device("cuda"))
    assert attention.in_c(torch.bfloat16, CPU) == ({"avx512_bf16", "avx512bw"} <= cpu_flags())


@pytest.mark.parametrize("avx512", [True, False])
def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(avx512: bool, tmp_path: Path) -> None:
    check_driver("attention_driver.c", attention.SOURCE, FLAGS, tmp_path, avx512=avx512)
