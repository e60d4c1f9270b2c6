"""Block attention equals PyTorch's with an explicit mask, values and gradients, whatever its buffers held before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.kernels import layout as layouts
from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_attention import BlockAttention
from qingtune.kernels.layout import Blocks, Layout, Segment
from qingtune.kernels.native import attention as attention_in_c
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")
SIZE = 8
# of the largest value of a tensor; bf16 rounds shares and their gradients to 8 bits before the products
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}


class Case(NamedTuple):
    """What one call gets."""

    segments: tuple[Segment, ...]
    rows: torch.Tensor
    blocks: Blocks
    heads: Attention
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor


def make_case(
    lengths: Sequence[int],
    shared: int = 0,
    rows: Sequence[int] | None = None,
    group: int = 2,
    key_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    window: int | None = None,
    size: int = SIZE,
) -> Case:
    """Segments of these lengths after a shared beginning; rows: the places that ask, None for all."""
    edges = list(accumulate(lengths, initial=shared))
    segments = [Segment(start, end, shared) for start, end in pairwise(edges)]
    if shared:
        segments.insert(0, Segment(0, shared, 0))
    places = torch.arange(edges[-1]) if rows is None else torch.tensor(rows, dtype=torch.int64)
    layout = Layout(torch.zeros(edges[-1]).long(), torch.zeros(edges[-1]).long(), tuple(segments), places, places)
    heads = Attention(group * key_heads, key_heads, size, 0.4, window=window)
    generator = torch.Generator().manual_seed(edges[-1])
    shapes = [(len(places), heads.queries, size), *[(edges[-1], key_heads, size)] * 2]
    shapes += [(len(places), heads.queries * size)]
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    blocks = layout.blocks(window, predicting=rows is not None)
    return Case(layout.segments, places, blocks, heads, *tensors)


def plain(case: Case) -> list[torch.Tensor]:
    """Output and gradients of q, k and v from autograd in fp64."""
    q, k, v = (x.to(torch.float64, copy=True).requires_grad_() for x in (case.q, case.k, case.v))
    out = torch.zeros(case.grad.shape, dtype=torch.float64)
    for segment in case.segments:
        mine = torch.nonzero((case.rows >= segment.start) & (case.rows < segment.end))[:, 0]
        keys = torch.tensor([*range(segment.shared), *range(segment.start, segment.end)])
        age = case.rows[mine][:, None] - segment.start + segment.shared - torch.arange(len(keys))[None]
        attended = F.scaled_dot_product_attention(
            q[mine].transpose(0, 1),
            k[keys].transpose(0, 1).repeat_interleave(case.heads.group, 0),
            v[keys].transpose(0, 1).repeat_interleave(case.heads.group, 0),
            attn_mask=(age >= 0) & (age < (case.heads.window or len(keys))),
            scale=case.heads.scale,
        )
        out = out.index_put((mine,), attended.transpose(0, 1).flatten(1))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), case.grad.double())]


def forward(workspace: Workspace, name: str, case: Case) -> torch.Tensor:
    out = torch.full_like(case.grad, torch.nan)
    BlockAttention(case.heads, workspace).forward(name, case.blocks, case.q, case.k, case.v, out)
    return out


def backward(workspace: Workspace, name: str, case: Case, out: torch.Tensor) -> list[torch.Tensor]:
    attention = BlockAttention(case.heads, workspace)
    grads = attention.backward(name, case.blocks, out, case.grad, len(case.k))
    return [grad.clone() for grad in grads]


def errors(found: Sequence[torch.Tensor], case: Case) -> list[float]:
    """Distances from the exact ones, relative."""
    return [float((mine - twin).norm() / twin.norm()) for mine, twin in zip(found, plain(case), strict=True)]


def check(found: Sequence[torch.Tensor], case: Case) -> None:
    for mine, twin in zip(found, plain(case), strict=True):
        assert mine.shape == twin.shape
        bound = BOUNDS[case.q.dtype] * max(1.0, float(twin.abs().max()) if twin.numel() else 0.0)
        torch.testing.assert_close(mine.double(), twin, rtol=0, atol=bound)


def check_alone(case: Case, workspace: Workspace | None = None) -> None:
    workspace = workspace or Workspace(CPU)
    out = forward(workspace, "a", case)
    check([out, *backward(workspace, "a", case, out)], case)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize(
    ("lengths", "group"), [((1,), 7), ((2, 1), 1), ((255, 256), 2), ((257, 2), 7), ((600, 1), 1)], ids=str
)
def test_every_row_asks(lengths: tuple[int, ...], shared: int, group: int) -> None:
    check_alone(make_case(lengths, shared, group=group))


@pytest.mark.parametrize("rows", [None, [6, 9, 11, 300, 301, 555]], ids=["all", "some"])
@pytest.mark.parametrize("shared", [0, 4, 300])
@pytest.mark.parametrize("window", [1, 3, 200, 700])
def test_windows(window: int, shared: int, rows: list[int] | None) -> None:
    rows = None if rows is None else [row + shared for row in rows]
    check_alone(make_case([8, 5, 600], shared, rows, window=window))


@pytest.fixture(params=[True, False], ids=["C", "PyTorch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention in C, where it can be, and without."""
    if not request.param:
        monkeypatch.setattr(attention_in_c, "compiled", lambda: None)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [0, 260])
def test_narrower_formats_within_their_rounding(shared: int, dtype: torch.dtype) -> None:
    check_alone(make_case([300, 1, 40], shared, dtype=dtype))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("window", [None, 9])
def test_a_large_part_that_all_keys_have_in_common_costs_no_digits(shared: int, window: int | None) -> None:
    case = make_case([70, 1, 30], shared, dtype=torch.bfloat16, window=window)
    case.k.add_(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 60)
    check_alone(case)


@pytest.mark.usefixtures("either")
def test_gradients_of_shared_keys_are_summed_in_fp32() -> None:
    """Each of 600 segments adds less to the gradient of what they share than half of its last bit in bf16."""
    case = make_case([1] * 600, 1, dtype=torch.bfloat16)
    case.v.fill_(1.0)
    case.q.fill_(0.0)
    case.grad.fill_(0.25)
    check_alone(case)


@pytest.mark.parametrize(
    "rows",
    [[], [5], [4, 5, 6, 7], [6, 9, 11, 300, 301, 555], [0, 3, 12], list(range(12, 612)), list(range(5, 612, 2))],
    ids=["none", "one", "one segment", "gaps", "the shared beginning too", "the last segment", "every other"],
)
@pytest.mark.parametrize("group", [1, 3])
def test_only_some_rows_ask(rows: list[int], group: int) -> None:
    check_alone(make_case([4, 4, 600], 4, rows, group=group))


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shared = draw(st.integers(0, 6))
    rows = draw(st.none() | st.sets(st.integers(0, shared + sum(lengths) - 1)).map(sorted))
    with mock.patch.object(layouts, "QUERY_BLOCK", draw(st.integers(1, 5))):
        group, key_heads = draw(st.sampled_from([1, 2, 7])), draw(st.integers(1, 2))
        return make_case(lengths, shared, rows, group, key_heads, dtype, draw(st.none() | st.integers(1, 12)))


@settings(max_examples=40, deadline=None)
@given(case=cases() | cases(torch.float32) | cases(torch.bfloat16))
def test_any_segments_rows_and_sizes_of_blocks(case: Case) -> None:
    check_alone(case)


def test_layers_interleave_under_their_own_names_while_sizes_grow_and_shrink() -> None:
    workspace = Workspace(CPU)
    for lengths in ([5, 3], [300, 7], [2], [9, 1, 9]):
        one, two = make_case(lengths, 2), make_case(lengths[:1], rows=[0, lengths[0] - 1])
        outs = [forward(workspace, "layer0", one), forward(workspace, "layer1", two)]
        check([outs[1], *backward(workspace, "layer1", two, outs[1])], two)
        check([outs[0], *backward(workspace, "layer0", one, outs[0])], one)


def test_what_a_pass_of_nan_left_behind_is_not_read() -> None:
    workspace, case = Workspace(CPU), make_case([270, 3], 4)
    for x in (broken := make_case([280, 5], 6))[4:]:
        x.fill_(torch.nan)
    out = forward(workspace, "a", broken)
    assert all(grad.isnan().any() for grad in backward(workspace, "a", broken, out))
    check_alone(case, workspace)
