"""The way into a gated delta net's recurrence: from a projection's rows to keys, queries and values of heads, and back.

A causal convolution of each channel over a few tokens, SiLU, and queries and keys brought to length 1, a chunk of
tokens at a time, so that what is wide stays in the caches.

Shapes: n tokens of a chunk, M channels (queries, then keys, then values), w tokens that the convolution sees; others as
in rule.py.
"""

from __future__ import annotations

import torch

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.delta.rule import EPSILON
from qingtune.kernels.projection import gradient
from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten


class DeltaHeads:
    """Of one layer; what it gives lies in the workspace until the next chunk.

    Args:
        sizes: of the layer.
        weight: of the convolution, [M, 1, w].
        workspace: for buffers.
        dtype: of the rows that it reads; computed is in fp32, or fp64 for fp64.
    """

    def __init__(self, sizes: DeltaNet, weight: torch.Tensor, workspace: Workspace, dtype: torch.dtype) -> None:
        self.sizes, self.weight, self.workspace, self.read = sizes, weight, workspace, dtype
        self.dtype = torch.promote_types(dtype, torch.float32)

    @property
    def history(self) -> int:
        """Tokens before a chunk that the convolution sees."""
        return self.sizes.kernel - 1

    def window(self, count: int) -> torch.Tensor:
        """Where a chunk's rows go, after the rows before them (0 where there are none): [w - 1 + n, M]."""
        return self.workspace.take("delta.window", (self.history + count, len(self.weight)), self.read)

    def taps(self) -> torch.Tensor:
        """The convolution's weight as [w, M]; the newest token's last."""
        taps = self._take("taps", self.sizes.kernel, len(self.weight))
        return taps.copy_(self.weight[:, 0].t())

    def forward(self, window: torch.Tensor, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and queries [K, 2, n, d], and values [K, n, R, e]."""
        sizes, count = self.sizes, len(window) - self.history
        kq = self._take("kq", sizes.key_heads, 2, count, sizes.key_size)
        v = self._take("v", sizes.key_heads, count, sizes.value_heads // sizes.key_heads, sizes.value_size)
        self._pack(*self._activate(window, taps), kq, v)
        return kq, v

    def backward(
        self,
        grad_kq: torch.Tensor,
        grad_v: torch.Tensor,
        window: torch.Tensor,
        kq: torch.Tensor,
        taps: torch.Tensor,
        grad_taps: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient of the window, to be called after forward of the same one.

        Args:
            grad_kq: as forward gives kq; overwritten. Likewise grad_v.
            window: what forward took, as taps.
            kq: what forward gave.
            grad_taps: [w, M], to which the convolution's gradient is added; None if it is frozen.
        """
        grad_window = self._take("grad_window", *window.shape)
        count = kq.shape[2]
        grad = self._through_activation(grad_kq, grad_v, kq)
        grad_window[: self.history].zero_()
        torch.mul(grad, taps[-1], out=grad_window[self.history :])
        for place in range(self.history):
            grad_window[place : place + count].addcmul_(grad, taps[place])
        if grad_taps is not None:
            for place, tap in enumerate(grad_taps):
                tap.add_((grad * window[place : place + count]).sum(0))
        return grad_window

    def add_weight_gradient(self, grad_taps: torch.Tensor) -> None:
        """Add what backward gathered, [w, M], to the weight's gradient."""
        gradient(self.weight).add_(grad_taps.t()[:, None])

    def _through_activation(self, grad_kq: torch.Tensor, grad_v: torch.Tensor, kq: torch.Tensor) -> torch.Tensor:
        """The gradient of what the convolution gives, [n, M]; both given ones may be overwritten."""
        sizes, count = self.sizes, kq.shape[2]
        mixed, rates = self._take("mixed", count, len(self.weight)), self._rates(count)
        grad = self._take("active", count, len(self.weight))
        dots = torch.mul(kq, grad_kq, out=self._take("kq_product", *kq.shape)).sum(-1, keepdim=True)
        dots[:, 1].mul_(sizes.key_size)  # queries are shorter by its root
        grad_kq.addcmul_(kq, dots, value=-1)
        apart = self._queries_keys(grad)
        for place, part in ((0, 1), (1, 0)):
            torch.mul(grad_kq[:, place].transpose(0, 1), rates[:, part], out=apart[:, part])
        self._values(grad).copy_(grad_v.transpose(0, 1))
        aten.silu_backward.grad_input(grad, mixed, grad_input=grad)
        return grad

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take("delta." + name, shape, self.dtype)

    def _activate(self, window: torch.Tensor, taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """SiLU of the convolution, [n, M], and the factors on queries and keys, [n, 2, K, 1]."""
        count = len(window) - self.history
        wide = self.workspace.cast("delta.window", window, self.dtype)
        mixed = torch.mul(wide[:count], taps[0], out=self._take("mixed", count, len(self.weight)))
        for place in range(1, len(taps)):
            mixed.addcmul_(wide[place : place + count], taps[place])
        active = self._take("active", count, len(self.weight))
        aten.silu.out(mixed, out=active)
        rates = self._rates(count)
        torch.linalg.vector_norm(self._queries_keys(active), dim=-1, keepdim=True, out=rates)
        rates.square_().add_(EPSILON).rsqrt_()
        rates[:, 0].mul_(self.sizes.key_size**-0.5)
        return active, rates

    def _pack(self, active: torch.Tensor, rates: torch.Tensor, kq: torch.Tensor, v: torch.Tensor) -> None:
        apart = self._queries_keys(active)
        for place, part in ((0, 1), (1, 0)):
            torch.mul(apart[:, part].transpose(0, 1), rates[:, part].transpose(0, 1), out=kq[:, place])
        v.copy_(self._values(active).transpose(0, 1))

    def _rates(self, count: int) -> torch.Tensor:
        return self._take("rates", count, 2, self.sizes.key_heads, 1)

    def _queries_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of [n, M] that holds queries and keys, [n, 2, K, d]."""
        sizes = self.sizes
        width = 2 * sizes.key_heads * sizes.key_size
        return rows[:, :width].unflatten(1, (2, sizes.key_heads, sizes.key_size))

    def _values(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of [n, M] that holds values, [n, K, R, e]."""
        sizes = self.sizes
        width = 2 * sizes.key_heads * sizes.key_size
        return rows[:, width:].unflatten(1, (sizes.key_heads, -1, sizes.value_size))
