"""The chunked loss of the head equals the plain one: values and gradients, over shapes and chunk sizes."""

from __future__ import annotations

import pytest
import torch

from qingtune.kernels import loss as kernel


def both(rows: int, weight_trained: bool, dtype: torch.dtype, autocast: bool = False) -> list[list[torch.Tensor]]:
    """Loss and gradients of the kernel and of its plain twin."""
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(50, 24, dtype=dtype)
    targets = torch.randint(0, 50, (rows,))
    found = []
    for function in (kernel.head_loss, kernel.head_loss_plain):
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
