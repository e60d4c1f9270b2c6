"""Causal attention over the segments of a layout by PyTorch's variable-length flash kernels (Dao 2023,
https://arxiv.org/abs/2307.08691), forward and backward: NVIDIA GPUs of compute capability 8.0 or more, 16-bit numbers.

Each segment's keys are those of the shared beginning and its own, laid end to end; as the kernels line a causal mask
up at the last key, its queries then see what they should. Same interface as BlockAttention, for layers in which every
token asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qingtune.kernels.architecture import Attention
    from qingtune.kernels.layout import Lengths
    from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten
LARGEST_HEAD = 192  # of the backward kernels on all GPUs that have them; data-centre ones go further


def fits(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernels compute this."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and head_size <= LARGEST_HEAD
        and head_size % 8 == 0
    )


def _causal(lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor, int, int, float, bool]:
    """Arguments of both kernels: lengths of the segments, no dropout, a causal mask."""
    return lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys, 0.0, True


class FlashAttention:
    """Attention of one layer; what backward needs stays in the workspace and here under the name of the layer."""

    def __init__(self, heads: Attention, workspace: Workspace) -> None:
        self.heads, self.workspace = heads, workspace
        self._kept: dict[str, tuple[torch.Tensor, ...]] = {}

    def forward(
        self, name: str, lengths: Lengths, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend: q [T, query heads, d], k and v [T, key-value heads, d] -> out [T, query heads * d].

        Backward finds what it needs under the name.
        """
        query = self.workspace.take(name + ".q", q.shape, q.dtype).copy_(q)
        key, value = (
            torch.index_select(x, 0, lengths.places, out=self._keys(name + end, lengths, x.dtype))
            for end, x in ((".k", k), (".v", v))
        )
        attended, logsumexp, *states, _ = aten._flash_attention_forward(
            query, key, value, *_causal(lengths), False, **self._factor_and_window(lengths)
        )
        out.view(query.shape).copy_(attended)
        self._kept[name] = (logsumexp, *states)

    def backward(
        self, name: str, lengths: Lengths, out: torch.Tensor, grad: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q [T, query heads, d], k and v [rows, key-value heads, d] for the gradient [T, query heads * d].

        Those of keys and values are added up in fp32 over the segments that share a beginning.

        Args:
            out: what forward gave.
        """
        logsumexp, *states = self._kept.pop(name)
        dtype, shape = grad.dtype, (len(grad), self.heads.queries, self.heads.size)
        grad_q, *parts = aten._flash_attention_backward(
            grad.view(shape),
            self.workspace.take(name + ".q", shape, dtype),
            self._keys(name + ".k", lengths, dtype),
            self._keys(name + ".v", lengths, dtype),
            out.view(shape),
            logsumexp,
            *_causal(lengths),
            *states,
            **self._factor_and_window(lengths),
        )
        wide = torch.promote_types(dtype, torch.float32)
        grad_k, grad_v = (
            self.workspace.take("attention.grad" + end, (rows, self.heads.keys, self.heads.size), wide)
            .zero_()
            .index_add_(0, lengths.places, part.to(wide))
            for end, part in zip((".k", ".v"), parts, strict=True)
        )
        return grad_q, grad_k, grad_v

    def _keys(self, name: str, lengths: Lengths, dtype: torch.dtype) -> torch.Tensor:
        """The packed keys or values, [K, key-value heads, d]."""
        return self.workspace.take(name, (len(lengths.places), self.heads.keys, self.heads.size), dtype)

    def _factor_and_window(self, lengths: Lengths) -> dict[str, Any]:
        """The factor on the scores, and where a window matters, the tokens that it reaches before each and after it."""
        window = self.heads.window
        if window is None or window >= lengths.most_keys:
            return {"scale": self.heads.scale}
        return {"scale": self.heads.scale, "window_size_left": window - 1, "window_size_right": 0}
