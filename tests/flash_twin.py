"""What stands in for a GPU's flash kernels on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from qingtune.kernels import flash_attention


class Twin:
    """The two operators as documented, a causal mask lined up at the last key, in plain PyTorch."""

    @staticmethod
    def _attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_starts: torch.Tensor,
        k_starts: torch.Tensor,
        scale: float,
        window_size_left: int = -1,
        window_size_right: int = -1,
    ) -> torch.Tensor:
        parts = []
        for (a, b), (c, d) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
            age = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
            assert window_size_right == (-1 if window_size_left < 0 else 0)
            seen = (age >= 0) & ((age <= window_size_left) | (window_size_left < 0))
            group = q.shape[1] // k.shape[1]
            key, value = (x[c:d].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
            part = F.scaled_dot_product_attention(q[a:b].transpose(0, 1), key, value, attn_mask=seen, scale=scale)
            parts.append(part.transpose(0, 1))
        return torch.cat(parts)

    def _flash_attention_forward(self, q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, *rest: Any, **how: Any):
        assert all(x.is_contiguous() for x in (q, k, v))
        assert rest[:2] == (int(q_starts.diff().max()), int(k_starts.diff().max()))
        assert rest[2:] == (0.0, True, False)
        out = self._attend(q, k, v, q_starts, k_starts, **how)
        return out, torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), torch.empty(0)

    def _flash_attention_backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, q_starts: Any, k_starts: Any, *rest: Any,
        **how: Any,
    ):  # fmt: skip
        assert [float(logsumexp), *map(float, rest[-2:])] == [1.0, 2.0, 3.0]
        assert out.equal(self._attend(q, k, v, q_starts, k_starts, **how))
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            again = self._attend(q, k, v, q_starts, k_starts, **how)
        return torch.autograd.grad(again, (q, k, v), grad)


@contextmanager
def flash_kernels_of_plain_pytorch() -> Iterator[None]:
    """Flash attention is taken wherever it could be on a GPU, with the twin for its kernels."""
    with (
        mock.patch.object(flash_attention, "aten", Twin()),
        mock.patch.object(flash_attention, "fits", return_value=True),
    ):
        yield
