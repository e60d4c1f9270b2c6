"""The chunked loss of the head equals the plain one: values and gradients, over shapes and chunk sizes."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.kernels import footprint
from qingtune.kernels import loss as kernel
from qingtune.kernels.native import elementwise as in_c
from qingtune.kernels.workspace import Workspace


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def both(rows: int, weight_trained: bool, dtype: torch.dtype, autocast: bool = False) -> list[list[torch.Tensor]]:
    """Loss and gradients of the kernel and of its plain twin."""
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(50, 24, dtype=dtype)
    targets = torch.randint(0, 50, (rows,))
    found = []
    for function in (kernel.head_loss, plain_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(weight_trained)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = function(h, w, targets)
        (value * 0.25).backward()
        found.append([value.detach(), h.grad, *([w.grad] if weight_trained else [])])
    return found


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("weight_trained", [False, True])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, rows: int, weight_trained: bool) -> None:
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 50 * 5)  # chunks of five rows, the last one smaller
    monkeypatch.setattr(footprint, "HEAD_TILE", 20)
    ours, plain = both(rows, weight_trained, torch.float32)
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_within_its_rounding(autocast: bool) -> None:
    ours, plain = both(33, True, torch.float32 if autocast else torch.bfloat16, autocast)
    for one, two in zip(ours, plain, strict=True):
        scale = two.abs().max().float()
        assert (one.float() - two.float()).abs().max() <= 0.02 * scale


def test_evaluation_keeps_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert not kernel.head_loss(hidden, weight, torch.tensor([0, 1, 2])).requires_grad


# --- head_loss_and_gradients -----------------------------------------------------------------------------------------

VOCABULARY = 50
CHUNKED_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest value of a tensor


def small_chunks(monkeypatch: pytest.MonkeyPatch, tile: int = 16) -> None:
    """Several chunks, rows and tiles, none of which divides what it cuts."""
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", VOCABULARY * 5)
    monkeypatch.setattr(footprint, "HEAD_TILE", tile)
    monkeypatch.setattr(kernel, "HEAD_ROWS", 6)
    monkeypatch.setattr(kernel, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(kernel, "VOCABULARY_TILE", tile)


def check_chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: float | None = None,
    hidden_wanted: bool = True,
    weight_wanted: bool = False,
    workspace: Workspace | None = None,
) -> None:
    torch.manual_seed(len(hidden))
    targets = torch.randint(0, len(weight), hidden.shape[:1])
    h, w = (x.to(torch.float64, copy=True).requires_grad_() for x in (hidden, weight))
    value = F.cross_entropy(h @ w.t(), targets, reduction="sum")
    twins = [value.detach(), *torch.autograd.grad(value * (1 if scale is None else scale), (h, w))]
    grad_hidden = torch.full_like(hidden, torch.nan) if hidden_wanted else None
    before = torch.randn_like(weight)
    grad_weight = before.clone() if weight_wanted else None
    kept = hidden.clone(), weight.clone()
    loss = kernel.head_loss_and_gradients(
        hidden,
        weight,
        targets,
        workspace or Workspace(torch.device("cpu")),
        scale=None if scale is None else torch.tensor(scale),
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
    )
    assert (loss.shape, loss.dtype) == ((), torch.promote_types(hidden.dtype, torch.float32))
    added = None if grad_weight is None else grad_weight.double() - before.double()
    for mine, twin in zip((loss, grad_hidden, added), twins, strict=True):
        if mine is not None:
            bound = CHUNKED_BOUNDS[hidden.dtype] * max(1.0, float(twin.abs().max()) if twin.numel() else 0.0)
            torch.testing.assert_close(mine.double(), twin, rtol=0, atol=bound)
    assert hidden.equal(kept[0])
    assert weight.equal(kept[1])


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rows", [0, 13])
@pytest.mark.parametrize("scale", [None, 2.0**-5])
@pytest.mark.parametrize("hidden_wanted", [False, True])
@pytest.mark.parametrize("weight_wanted", [False, True])
def test_chunks_give_scaled_gradients_and_the_loss_unscaled(
    monkeypatch: pytest.MonkeyPatch, rows: int, scale: float | None, hidden_wanted: bool, weight_wanted: bool
) -> None:
    small_chunks(monkeypatch)
    torch.manual_seed(rows)
    check_chunked(normal(rows, 24), normal(VOCABULARY, 24), scale, hidden_wanted, weight_wanted)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 30),
    vocabulary=st.integers(1, 60),
    chunk=st.integers(1, 300),
    at_a_time=st.integers(1, 9),
    tile=st.integers(1, 70),
    weight_wanted=st.booleans(),
)
def test_any_sizes_of_chunks_and_tiles(
    rows: int, vocabulary: int, chunk: int, at_a_time: int, tile: int, weight_wanted: bool
) -> None:
    torch.manual_seed(rows)
    sizes: dict[str, Any] = {"CHUNK_ELEMENTS": chunk, "ROWS_AT_A_TIME": at_a_time, "VOCABULARY_TILE": tile}
    sizes["HEAD_ROWS"] = chunk
    with mock.patch.multiple(kernel, **sizes), mock.patch.object(footprint, "HEAD_TILE", tile):
        check_chunked(normal(rows, 8), normal(vocabulary, 8), 0.5, True, weight_wanted)


@pytest.mark.parametrize("tile", [7, 25])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "weight_wanted"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
    ],
    ids=str,
)
def test_heads_of_another_format_or_trained_are_taken_in_tiles(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_dtype: torch.dtype, weight_wanted: bool, tile: int
) -> None:
    small_chunks(monkeypatch, tile)
    torch.manual_seed(0)
    check_chunked(normal(13, 24, dtype=dtype), normal(VOCABULARY, 24, dtype=weight_dtype), 0.5, True, weight_wanted)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_tiles_hold_for_rising_logits_in_c_and_in_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_dtype: torch.dtype, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(in_c, "elementwise", lambda: None)
    small_chunks(monkeypatch)
    torch.manual_seed(0)
    weight = normal(VOCABULARY, 24) * torch.linspace(0.1, 3, VOCABULARY)[:, None]  # each tile has a larger one
    check_chunked(normal(13, 24, dtype=dtype), weight.to(weight_dtype), 0.5)


@pytest.mark.parametrize("native", [False, True])
def test_gradients_of_tokens_that_are_nearly_certain_keep_their_digits_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(in_c, "elementwise", lambda: None)
    small_chunks(monkeypatch)
    torch.manual_seed(0)
    weight, targets = normal(VOCABULARY, 24, dtype=torch.bfloat16), torch.arange(5) * 11
    hidden = weight[targets] * 0.4
    wide = hidden.double().requires_grad_()
    loss = F.cross_entropy(wide @ weight.double().t(), targets, reduction="sum")
    (twin,) = torch.autograd.grad(loss, wide)
    assert 1e-4 < loss.item() < 0.5  # a share of 16 bits would lose more than half of some gradients
    grad = torch.empty_like(hidden)
    kernel.head_loss_and_gradients(hidden, weight, targets, Workspace(torch.device("cpu")), grad_hidden=grad)
    assert ((grad.double() - twin).norm(dim=1) <= 0.06 * twin.norm(dim=1)).all()  # of which logits lose 0.03


def test_tiles_stay_in_a_cache_and_are_few_on_a_gpu() -> None:
    assert footprint.head_tile(151_936, 440, large=False) == 4096
    assert footprint.head_tile(151_936, 200, large=True) == 151_936
    for rows in (8, 440, 4096):
        tile = footprint.head_tile(151_936, rows, large=True)
        assert tile * rows == footprint.logit_numbers(151_936, rows, trains_head=False, large=True)
        assert tile * rows <= footprint.CHUNK_ELEMENTS < (tile + 1) * rows or tile == 151_936
    assert footprint.logit_numbers(300, 435, trains_head=False, large=False) == 300 * 440


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand_do_not_overflow(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    small_chunks(monkeypatch)
    torch.manual_seed(0)
    hidden, weight = normal(13, 24, dtype=dtype) * 100, normal(VOCABULARY, 24, dtype=dtype) * 100
    assert (hidden @ weight.t()).abs().max() > 1e4
    check_chunked(hidden, weight)


def test_a_loss_near_zero_keeps_its_digits() -> None:
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    grad = torch.empty(1, 2)
    loss = kernel.head_loss_and_gradients(
        hidden, weight, torch.tensor([0]), Workspace(torch.device("cpu")), grad_hidden=grad
    )
    torch.testing.assert_close(loss.item(), 2 * math.exp(-8), rtol=1e-3, atol=0)
    torch.testing.assert_close(grad[0, 0].item(), -16 * math.exp(-8), rtol=1e-3, atol=0)


def test_nan_is_not_hidden_and_does_not_stay_in_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    torch.manual_seed(0)
    workspace = Workspace(torch.device("cpu"))
    hidden, weight = normal(13, 24), normal(VOCABULARY, 24)
    broken, grad = hidden.clone(), torch.zeros(13, 24, dtype=torch.float64)
    broken[4, 2] = torch.nan
    loss = kernel.head_loss_and_gradients(broken, weight, torch.arange(13), workspace, grad_hidden=grad)
    assert loss.isnan()
    assert grad.isnan().all(1).nonzero().tolist() == [[4]]
    for weight_wanted in (False, True):
        check_chunked(hidden, weight, 0.5, True, weight_wanted, workspace)
