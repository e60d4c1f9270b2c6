"""The packing around flash attention: a twin stands in for the kernels, PyTorch's shape rules check the calls.

The kernels themselves are compared on a GPU, in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flash_twin import flash_kernels_of_plain_pytorch
from test_block_attention import SIZE, Case, check, make_case

from qingtune.kernels import flash_attention
from qingtune.kernels.architecture import Attention
from qingtune.kernels.flash_attention import FlashAttention
from qingtune.kernels.layout import Layout
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture
def twin() -> Iterator[None]:
    with flash_kernels_of_plain_pytorch():
        yield


def layout_of(case: Case) -> Layout:
    places = torch.zeros(len(case.k), dtype=torch.int64)
    return Layout(places, places, case.segments, case.rows, case.rows)


def run(case: Case, workspace: Workspace) -> list[torch.Tensor]:
    """Output and gradients; what forward was given is overwritten before backward, as the decoder does it."""
    attention = FlashAttention(case.heads, workspace)
    lengths = layout_of(case).lengths
    out = torch.full_like(case.grad, torch.nan)
    given = [x.clone() for x in (case.q, case.k, case.v)]
    attention.forward("a", lengths, *given, out)
    for x in given:
        x.fill_(torch.nan)
    return [out, *attention.backward("a", lengths, out, case.grad, len(case.k))]


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 6, 200])
@pytest.mark.parametrize(("lengths", "group"), [((1,), 7), ((2, 1), 1), ((40, 31), 2), ((5, 1, 1, 64), 7)], ids=str)
def test_gives_what_plain_attention_gives(
    lengths: tuple[int, ...], shared: int, group: int, window: int | None
) -> None:
    case = make_case(lengths, shared, group=group, window=window)
    check(run(case, Workspace(CPU)), case)


@pytest.mark.usefixtures("twin")
def test_buffers_of_a_larger_pass_do_not_show() -> None:
    workspace = Workspace(CPU)
    run(make_case((90, 40), 9), workspace)
    case = make_case((30, 4), 2)
    check(run(case, workspace), case)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shared", [0, 3])
def test_calls_fit_the_operators(shared: int, window: int | None) -> None:
    """PyTorch computes shapes on its meta device for the real operators; wrong arguments or shapes fail there."""
    case = make_case((40, 31), shared, dtype=torch.bfloat16)
    lengths = layout_of(case).lengths
    meta = torch.device("meta")
    q, k, v, grad = (x.to(meta) for x in (case.q, case.k, case.v, case.grad))
    lengths = type(lengths)(
        *(x.to(meta) for x in (lengths.queries, lengths.keys, lengths.places)), lengths.most_queries, lengths.most_keys
    )
    attention = FlashAttention(Attention(4, 2, SIZE, 0.4, window=window), Workspace(meta))
    attention.forward("a", lengths, q, k, v, out := torch.empty_like(grad))
    grads = attention.backward("a", lengths, out, grad, len(k))
    assert [tuple(x.shape) for x in grads] == [tuple(x.shape) for x in (q, k, v)]


def test_is_for_gpus_alone() -> None:
    assert not flash_attention.fits(CPU, torch.bfloat16, 64)
