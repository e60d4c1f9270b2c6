"""Buffers that one pass after another uses again.

A training pass on a CPU asks for the same few hundred blocks each time. Taken from the heap they leave holes (1.5 GB
at 0.5B parameters) and each large one is zeroed by the kernel each time; kept by name they cost neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qingtune.kernels.native import few_rows, products
from qingtune.kernels.native.elementwise import native


class Workspace:
    """Named buffers, made at first use and grown when a pass needs more; what they hold is undefined until written.

    Attributes:
        headroom: how many times what is asked for is taken when a buffer has to be made, since a later pass may need
            more; on a CPU, memory that is never written costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], torch.Tensor] = {}  # what was given out, mostly asked for again
        self.headroom = 1.0

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape; the same memory whenever the name and dtype are the same."""
        key = name, dtype
        last = self._last.get(key)
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = last = None  # give the old block back before the new one is taken
            self._last.pop(key, None)
            self._held.pop(key, None)
            held = self._held[key] = torch.empty(math.ceil(size * self.headroom), dtype=dtype, device=self._device)
        last = self._last[key] = held[:size].view(*shape)
        return last

    def cast(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a dtype; a copy under the name if it has another, where PyTorch would take fresh memory."""
        return tensor if tensor.dtype == dtype else self.take(name, tensor.shape, dtype).copy_(tensor)

    def multiply(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        add: bool = False,
        bias: torch.Tensor | None = None,
    ) -> None:
        """out (+)= x @ weight + bias, in x's dtype.

        A weight of another dtype is read as it is where there are kernels for that, else converted for the moment.

        Args:
            x: [T, K].
            weight: [K, N], contiguous or the transpose of a contiguous one.
            out: [T, N], overwritten, or added to if `add` says so.
            bias: [N], without `add` only.
        """
        same = weight if products.fits(x, weight, out) else self._like(x, weight)
        for kernels in (products, few_rows):
            if kernels.fits(x, same, out):
                if bias is not None:
                    out.copy_(bias)
                kernels.multiply(x, same, out, add=add or bias is not None)
                return
        if add:
            out.addmm_(x, same)
        elif bias is not None:
            torch.addmm(bias.to(x.dtype), x, same, out=out)
        else:
            torch.mm(x, same, out=out)

    def _like(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A weight, [K, N], in x's dtype, converted as it lies in memory."""
        if weight.is_contiguous():
            return self.cast("weight", weight, x.dtype)
        return self.cast("weight", weight.t(), x.dtype).t()

    def product(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """left @ right, [m, n], in a dtype, until the next one."""
        out = self.take("product", (left.shape[0], right.shape[1]), left.dtype)
        return self.cast("product", torch.mm(left, right, out=out), dtype)

    def add_product(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> None:
        """total += alpha * left @ right, [m, n]; in a total of another dtype a product rounded to left's is added."""
        if total.dtype == left.dtype:
            total.addmm_(left, right, alpha=alpha)
        else:
            self.accumulate(total, self.product(left, right, left.dtype), alpha)

    def accumulate(self, total: torch.Tensor, part: torch.Tensor, alpha: float = 1.0) -> None:
        """total += alpha * part, which may be of another dtype and may be the last product."""
        if total.dtype == torch.float32 != part.dtype and native(total) and (c := native(part)):
            c.accumulate(part, alpha, total)
        else:
            total.add_(self.cast("product", part, total.dtype), alpha=alpha)

    def clear(self) -> None:
        """Give all memory back."""
        self._last.clear()
        self._held.clear()

    def held_bytes(self) -> int:
        """What all buffers take together."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._held.values())
