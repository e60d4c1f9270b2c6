"""Linear layers that read one input, with their adapters: forward, and a backward that keeps next to nothing.

y_i = W_i x + b_i + s_i B_i A_i dropout(x), or for DoRA m_i (W_i x + s_i B_i A_i x) / |W_i + s_i B_i A_i| + b_i, without
dropout. Beside the input, which its block keeps or computes again, only the adapters' small A x and DoRA's norms are
kept. Frozen weights may be dense, NF4 (a layer at a time is dequantised) or int8 (multiplied as they are, where the CPU
has int8 units). The layers of one group share the input's dropout mask, its quantised form and one product with all
A_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qingtune.kernels.buffers import GroupSizes
from qingtune.kernels.dropout import keep_mask
from qingtune.kernels.footprint import low_rank_room
from qingtune.kernels.int8 import int8_product, quantize_rows
from qingtune.kernels.linear import Int8Linear, QuantizedLinear
from qingtune.kernels.native.low_rank import LowRankProducts, native_low_rank
from qingtune.kernels.workspace import Workspace


@dataclass(frozen=True)
class Adapter:
    """A layer's low-rank addition: A [r, in], B [out, r], both trained, and the factor on their product.

    DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) trains a magnitude [out] too, and divides by the norms of
    the merged weight's rows, which get no gradient (section 4.3).
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    magnitude: nn.Parameter | None = None


@dataclass(frozen=True)
class Member:
    """One layer of a group: a dense nn.Linear or a quantised one, and its adapter if it has one."""

    base: Any
    adapter: Adapter | None

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features."""
        return self.base.out_features, self.base.in_features

    @property
    def rank(self) -> int:
        """The adapter's, 0 where there is none."""
        return len(self.adapter.a) if self.adapter else 0

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's, if it is that."""
        return self.adapter.magnitude if self.adapter else None


class Projection:
    """A group of layers with one input.

    Args:
        members: the layers, of one number of in features.
        dropout: probability with which the adapters' input is dropped.
        workspace: for all that lasts no longer than a pass.
        int8_units: whether int8 weights are multiplied as such; otherwise they are dequantised.
    """

    def __init__(self, members: Sequence[Member], dropout: float, workspace: Workspace, *, int8_units: bool) -> None:
        self.members, self.dropout, self.workspace = tuple(members), dropout, workspace
        self.int8_units = int8_units
        self.ranks = [member.rank for member in members]
        self.fit_words = {itemsize: self.sizes.fit_words(itemsize) for itemsize in (2, 4)}
        self.dora = any(member.magnitude is not None for member in members)
        if self.dora and dropout:
            raise ValueError("DoRA with dropout multiplies by each weight twice, which is not done here")

    @property
    def sizes(self) -> GroupSizes:
        """What it takes memory for."""
        outs, reads = zip(*(member.shape for member in self.members), strict=True)
        return GroupSizes(reads[0], outs, tuple(self.ranks))

    def forward(
        self, name: str, x: torch.Tensor, outs: Sequence[torch.Tensor], seed: int | None, *, add: bool = False
    ) -> None:
        """Write each layer's output.

        Args:
            name: under which A x is kept for backward.
            x: [T, in].
            outs: [T, out] for each layer.
            seed: of the dropout mask; None for no dropout.
            add: add to what outs hold.
        """
        rows = self._int8_rows(x)
        self.keep_low(name, x, seed)
        for number, (member, low, out) in enumerate(zip(self.members, self._low(name, x), outs, strict=True)):
            if member.magnitude is None:
                self._product(member, x, rows, low, out, member.base.bias, add=add)
                continue
            direction = self._direction(member, x, rows, low).mul_(member.magnitude / self._norms(name, number))
            if member.base.bias is not None:
                direction.add_(member.base.bias)
            if add:
                out.add_(direction)
            else:
                out.copy_(direction)

    def backward(
        self, name: str, x: torch.Tensor, grads: Sequence[torch.Tensor], grad_x: torch.Tensor | None, seed: int | None
    ) -> None:
        """Add to the gradients of all trained parameters, and write the input's; name, x and seed are those of forward.

        Args:
            grads: [T, out] for each layer.
            grad_x: [T, in], overwritten; None if nobody wants it.
        """
        if self.dora:
            grads = self._through_magnitudes(name, x, grads)
        for number, (member, grad) in enumerate(zip(self.members, grads, strict=True)):
            self._dense_gradients(member.base, x, grad)
            if grad_x is not None:
                self._frozen_backward(member.base, grad, grad_x, add=number > 0)
        if any(self.ranks):
            self._adapter_gradients(name, x, grads, grad_x, seed)

    def _int8_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The input's rows in 8 bits, where a layer multiplies them so."""
        if not (self.int8_units and any(isinstance(member.base, Int8Linear) for member in self.members)):
            return None
        return quantize_rows(x, None, self.workspace, "projection.x")

    def _product(
        self,
        member: Member,
        x: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor] | None,
        low: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        add: bool = False,
    ) -> None:
        """W x + bias + s B low, put or added to out; rows: x in 8 bits, low: A dropout(x)."""
        base = member.base
        if rows is not None and isinstance(base, Int8Linear):
            int8_product(*rows, base.packed.t(), base.scale.view(-1), out, self.workspace, add=add)
        else:
            first, bias = (None, bias) if add else (bias, None)
            self.workspace.multiply(x, self._stored(base, x.dtype).t(), out, add=add, bias=first)
        if bias is not None:
            out.add_(bias)
        if adapter := member.adapter:
            if c := self._in_c(x):
                c.expand(low, [adapter.b], out, transposed=True, scale=adapter.scaling)
            else:
                out.addmm_(low, self._b(adapter, x.dtype).t(), alpha=adapter.scaling)

    # --- Adapters ----------------------------------------------------------------------------------------------------

    def keep_low(self, name: str, x: torch.Tensor, seed: int | None) -> None:
        """Keep what backward needs in addition to the input."""
        if any(self.ranks):
            dropped, low = self._dropped(x, seed), self._all_low(name, x)
            if c := self._in_c(x):
                c.reduce(dropped, self._each_a(), low, self._room(x, low), transposed=True)
            else:
                torch.mm(dropped, self._all_a(x.dtype).t(), out=low)
        for number, member in enumerate(self.members):
            if member.adapter and member.magnitude is not None:
                self._norms(name, number).copy_(self._row_norms(member.base, member.adapter))

    def _all_low(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """All A_i dropout(x) side by side, [T, sum of ranks]."""
        return self.workspace.take(name + ".low", (len(x), sum(self.ranks)), x.dtype)

    def _low(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A_i dropout(x) of each layer, [T, rank]."""
        return self._all_low(name, x).split_with_sizes(self.ranks, 1)

    def _adapter_gradients(
        self, name: str, x: torch.Tensor, grads: Sequence[torch.Tensor], grad_x: torch.Tensor | None, seed: int | None
    ) -> None:
        c, dropped = self._in_c(x), self._dropped(x, seed)
        grad_low = self.workspace.take("projection.grad_low", (len(x), sum(self.ranks)), x.dtype)
        parts = zip(self.members, grads, self._low(name, x), grad_low.split_with_sizes(self.ranks, 1), strict=True)
        for member, grad, low, grad_mine in parts:
            if adapter := member.adapter:
                self._b_gradients(c, adapter, grad, low, grad_mine)
        if c:
            c.outer(grad_low, dropped, [gradient(a) for a in self._each_a()])
        else:
            grad_a = self.workspace.product(grad_low.t(), dropped, x.dtype)
            ranks = [rank for rank in self.ranks if rank]
            for a, part in zip(self._each_a(), grad_a.split_with_sizes(ranks), strict=True):
                self.workspace.accumulate(gradient(a), part)
        if grad_x is None:
            return
        if seed is None:
            self._add_low(c, grad_low, grad_x)
        else:
            mask, factor = keep_mask(x.shape, self.dropout, seed, x.device)
            grad_x.addcmul_(self._add_low(c, grad_low, torch.zeros_like(x)), mask.to(x.dtype), value=factor)

    def _b_gradients(
        self, c: LowRankProducts | None, adapter: Adapter, grad: torch.Tensor, low: torch.Tensor, grad_low: torch.Tensor
    ) -> None:
        """Add to the gradient of B, and write that of A dropout(x)."""
        if c:
            grad = grad if grad.stride(1) == 1 else grad.contiguous()  # of a delta net's gates they lie across
            c.outer(grad, low, [gradient(adapter.b)], adapter.scaling)
            room = self._room(grad, grad_low)
            c.reduce(grad, [adapter.b], grad_low, room, transposed=False, scale=adapter.scaling)
            return
        self.workspace.add_product(gradient(adapter.b), grad.t(), low, adapter.scaling)
        product = self.workspace.take("projection.grad_mine", grad_low.shape, grad.dtype)
        torch.mm(grad, self._b(adapter, grad.dtype), out=product)
        grad_low.copy_(product.mul_(adapter.scaling))

    def _add_low(self, c: LowRankProducts | None, grad_low: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """total += the gradient of A's inputs, [T, in]; returns total."""
        if c:
            c.expand(grad_low, self._each_a(), total, transposed=False)
            return total
        return total.addmm_(grad_low, self._all_a(total.dtype))

    def _in_c(self, x: torch.Tensor) -> LowRankProducts | None:
        """The adapters' products in C, where they take these activations and sizes; otherwise PyTorch multiplies."""
        c = native_low_rank(x.dtype, x.device)
        fp32 = all(m.adapter is None or m.adapter.a.dtype == m.adapter.b.dtype == torch.float32 for m in self.members)
        return c if c and fp32 and self.fit_words[x.dtype.itemsize] else None

    def _room(self, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """For a matrix of adapters as products lay it out."""
        size = low_rank_room(x.shape[1], low.shape[1], x.dtype.itemsize)
        return self.workspace.take("projection.room", (size,), torch.float32)

    def _dropped(self, x: torch.Tensor, seed: int | None) -> torch.Tensor:
        if seed is None:
            return x
        mask, factor = keep_mask(x.shape, self.dropout, seed, x.device)
        dropped = self.workspace.take("projection.dropped", x.shape, x.dtype)
        return torch.mul(x, mask, out=dropped).mul_(factor)

    def _each_a(self) -> list[nn.Parameter]:
        return [member.adapter.a for member in self.members if member.adapter]

    def _all_a(self, dtype: torch.dtype) -> torch.Tensor:
        """All A_i, one below the other, [sum of ranks, in]."""
        stacked = self.workspace.take("projection.a", (sum(self.ranks), self.members[0].shape[1]), dtype)
        for member, part in zip(self.members, stacked.split_with_sizes(self.ranks), strict=True):
            if member.adapter:
                part.copy_(member.adapter.a)
        return stacked

    def _b(self, adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
        return self.workspace.take("projection.b", adapter.b.shape, dtype).copy_(adapter.b)

    # --- DoRA --------------------------------------------------------------------------------------------------------

    def _norms(self, name: str, number: int) -> torch.Tensor:
        """Where a layer's |W + s B A| is kept, fp32 [out] (fp64 for fp64)."""
        member = self.members[number]
        assert member.magnitude is not None
        dtype = torch.promote_types(member.magnitude.dtype, torch.float32)
        return self.workspace.take(f"{name}.norms{number}", member.shape[:1], dtype)

    def _row_norms(self, base: Any, adapter: Adapter) -> torch.Tensor:
        dtype = torch.promote_types(adapter.a.dtype, torch.float32)
        weight = self._weight(base, dtype)
        merged = self.workspace.take("projection.merged", weight.shape, dtype)
        torch.addmm(weight, adapter.b.to(dtype), adapter.a.to(dtype), alpha=adapter.scaling, out=merged)
        return torch.linalg.vector_norm(merged, dim=1)

    def _direction(
        self, member: Member, x: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor] | None, low: torch.Tensor
    ) -> torch.Tensor:
        """W x + s B A x, [T, out], until the next one."""
        direction = self.workspace.take("projection.direction", (len(x), member.shape[0]), x.dtype)
        self._product(member, x, rows, low, direction, None)
        return direction

    def _through_magnitudes(self, name: str, x: torch.Tensor, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Add the magnitudes' gradients; returns those of what the magnitudes scale, W x + s B A x, computed again."""
        rows, scaled = self._int8_rows(x), list(grads)
        for number, (member, low, grad) in enumerate(zip(self.members, self._low(name, x), grads, strict=True)):
            if member.magnitude is None:
                continue
            norms = self._norms(name, number)
            product = self._direction(member, x, rows, low).mul_(grad)
            gradient(member.magnitude).add_(product.sum(0, dtype=norms.dtype).div_(norms))
            mine = self.workspace.take(f"projection.scaled{number}", grad.shape, grad.dtype)
            scaled[number] = mine.copy_(grad).mul_(member.magnitude / norms)
        return scaled

    # --- Frozen and dense weights ------------------------------------------------------------------------------------

    def _frozen_backward(self, base: Any, grad: torch.Tensor, grad_x: torch.Tensor, *, add: bool) -> None:
        if self.int8_units and isinstance(base, Int8Linear):
            rows = quantize_rows(grad, base.scale.view(-1), self.workspace, "projection.grad")
            int8_product(*rows, base.packed, None, grad_x, self.workspace, add=add)
        else:
            self.workspace.multiply(grad, self._stored(base, grad.dtype), grad_x, add=add)

    def _stored(self, base: Any, dtype: torch.dtype) -> torch.Tensor:
        """The layer's weight for products in the dtype: as it is held if that is dense, else unpacked; [out, in]."""
        return self._weight(base, base.unpacked_dtype(dtype)) if isinstance(base, QuantizedLinear) else base.weight

    def _weight(self, base: Any, dtype: torch.dtype) -> torch.Tensor:
        """The layer's weight in a dtype, [out, in]; for a moment if it has to be made."""
        if isinstance(base, QuantizedLinear):
            return base.dequantize(dtype, self.workspace.take("weight", (base.out_features, base.in_features), dtype))
        return self.workspace.cast("weight", base.weight, dtype)

    def _dense_gradients(self, base: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Full training: the gradients of weight and bias."""
        if isinstance(base, QuantizedLinear):
            return
        if base.weight.requires_grad:
            self.workspace.add_product(gradient(base.weight), grad.t(), x)
        if base.bias is not None and base.bias.requires_grad:
            gradient(base.bias).add_(grad.sum(0, dtype=base.bias.dtype))


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, zero at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
