"""One matrix of each expert of a mixture, with adapters: products with rows that are sorted by expert.

y = W_e x + s B_e A_e x. Weights are a parameter [E, out, in], or a list of layers in 4 or 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qingtune.kernels.experts.buffers import StackSizes
from qingtune.kernels.experts.modules import MATRICES, LoRAExperts
from qingtune.kernels.footprint import low_rank_room
from qingtune.kernels.linear import Int8Linear, QuantizedLinear
from qingtune.kernels.native import few_rows
from qingtune.kernels.native.low_rank import LowRankProducts, native_low_rank
from qingtune.kernels.projection import Adapter, Member, Projection, gradient
from qingtune.kernels.workspace import Workspace


@dataclass(frozen=True)
class Stack:
    """Where one matrix of each expert lies.

    Attributes:
        module: holds them.
        name: of the module's parameter [E, out, in], or of its list of quantised layers.
        adapter: A [E, r, in] and B [E, out, r], without a magnitude; None for none.
    """

    module: Any
    name: str
    adapter: Adapter | None = None

    @property
    def weights(self) -> Any:
        """A parameter [E, out, in], or a list of quantised layers."""
        return getattr(self.module, self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features of an expert's matrix."""
        first = self.weights[0]
        return (first.out_features, first.in_features) if isinstance(first, QuantizedLinear) else tuple(first.shape)

    @property
    def rank(self) -> int:
        """Of an expert's adapter; 0 without one."""
        return self.adapter.a.shape[1] if self.adapter else 0


def stacks(experts: Any) -> tuple[Stack, Stack]:
    """Where gates and ups lie, as one matrix, and downs; experts: a mixture's module of them."""
    found: list[Stack] = []
    for name in MATRICES:
        adapter = getattr(experts, name) if isinstance(experts, LoRAExperts) else None
        held = experts.base if isinstance(experts, LoRAExperts) else experts
        found.append(Stack(held, name, adapter and Adapter(adapter.lora_A, adapter.lora_B, adapter.scaling)))
    return found[0], found[1]


class _Slice:
    """An expert's part of a parameter, as projections take a layer; with `backward` its gradient is the parameter's."""

    bias = None

    def __init__(self, stack: Stack, number: int, *, backward: bool) -> None:
        self._stack, self._number, self._backward = stack, number, backward
        self.out_features, self.in_features = stack.shape

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]."""
        weights = self._stack.weights
        weight = weights.detach()[self._number]
        if self._backward and weights.requires_grad:
            weight.requires_grad_(True)
            weight.grad = gradient(weights)[self._number]
        return weight


class ExpertMatrices:
    """The products of a stack.

    Args:
        stack: where the matrices lie.
        workspace: for all that lasts no longer than a pass.
        int8_units: whether int8 weights are multiplied as such.
    """

    def __init__(self, stack: Stack, workspace: Workspace, *, int8_units: bool) -> None:
        self.stack, self.workspace, self.int8_units = stack, workspace, int8_units
        self.shape, self.rank = stack.shape, stack.rank
        self._products: dict[tuple[int, bool], Projection] = {}  # of experts that were asked for
        self._fit_words = {itemsize: self.sizes.fit_words(itemsize) for itemsize in (2, 4, 8)}

    @property
    def sizes(self) -> StackSizes:
        """What it takes memory for."""
        weights = self.stack.weights
        trained = isinstance(weights, torch.Tensor) and weights.requires_grad
        return StackSizes(reads=self.shape[1], out=self.shape[0], rank=self.rank, trained=trained)

    @property
    def in_int8(self) -> bool:
        """Whether the weights are multiplied as int8."""
        return self.int8_units and isinstance(self.stack.weights[0], Int8Linear)

    def multiplies_few_rows_in_c(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether up to few_rows.MOST rows of activations of this dtype there need no product by PyTorch."""
        adapters = not self.rank or self._low_rank(dtype, device) is not None
        return few_rows.takes(dtype, device) and adapters and not (self.in_int8 or self.sizes.trained)

    def low(self, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Where A_e x of all rows is kept from forward to backward, [rows, r]."""
        return self.workspace.take(name + ".low", (rows, self.rank), dtype)

    def forward(self, number: int, x: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> None:
        """x: [n, in], of the expert of this number -> out: [n, out], and low: [n, r]."""
        self._product(number).forward("experts", x, [out], None)
        self.keep_low(number, x, low)
        if adapter := self.stack.adapter:
            self._add_low(low, adapter.b[number], out, adapter.scaling, transposed=True)

    def keep_low(self, number: int, x: torch.Tensor, low: torch.Tensor) -> None:
        """Keep what backward needs in addition to the input."""
        if adapter := self.stack.adapter:
            self._lower(x, adapter.a[number], low, 1.0, transposed=True)

    def backward(
        self, number: int, x: torch.Tensor, low: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor
    ) -> None:
        """Add to the gradients of all trained parameters, and write the input's.

        Args:
            number: the expert's; x and low are those of forward.
            low: overwritten.
            grad: [n, out].
            grad_x: [n, in], overwritten.
        """
        self._product(number, backward=True).backward("experts", x, [grad], grad_x, None)
        if not (adapter := self.stack.adapter):
            return
        self._add_outer(grad, low, gradient(adapter.b)[number], adapter.scaling)
        self._lower(grad, adapter.b[number], low, adapter.scaling, transposed=False)
        self._add_outer(low, x, gradient(adapter.a)[number], 1.0)
        self._add_low(low, adapter.a[number], grad_x, 1.0, transposed=False)

    # --- Products with an adapter's matrix, [out, r] or [r, in], or its transpose -----------------------------------

    def _lower(
        self, x: torch.Tensor, matrix: torch.Tensor, low: torch.Tensor, scale: float, *, transposed: bool
    ) -> None:
        """low = scale * x @ matrix."""
        if c := self._low_rank(x.dtype, x.device):
            size = low_rank_room(x.shape[1], self.rank, x.dtype.itemsize)
            room = self.workspace.take("experts.room", (size,), torch.float32)
            c.reduce(x, [matrix], low, room, transposed=transposed, scale=scale)
        else:
            torch.mm(x, self._cast(matrix, x.dtype, transposed=transposed), out=low).mul_(scale)

    def _add_low(
        self, low: torch.Tensor, matrix: torch.Tensor, total: torch.Tensor, scale: float, *, transposed: bool
    ) -> None:
        """total += scale * low @ matrix."""
        if c := self._low_rank(low.dtype, low.device):
            c.expand(low, [matrix], total, transposed=transposed, scale=scale)
        else:
            total.addmm_(low, self._cast(matrix, low.dtype, transposed=transposed), alpha=scale)

    def _add_outer(self, left: torch.Tensor, right: torch.Tensor, total: torch.Tensor, scale: float) -> None:
        """total += scale * left^T @ right."""
        if c := self._low_rank(left.dtype, left.device):
            c.outer(left, right, [total], scale)
        else:
            total.add_(self.workspace.product(left.t(), right, total.dtype), alpha=scale)

    def _low_rank(self, dtype: torch.dtype, device: torch.device) -> LowRankProducts | None:
        """The functions in C, where they take the adapter and activations of this dtype there."""
        adapter = self.stack.adapter
        assert adapter is not None
        fp32 = adapter.a.dtype == adapter.b.dtype == torch.float32
        return native_low_rank(dtype, device) if fp32 and self._fit_words[dtype.itemsize] else None

    def _cast(self, matrix: torch.Tensor, dtype: torch.dtype, *, transposed: bool) -> torch.Tensor:
        same = self.workspace.cast("experts.adapter", matrix.detach(), dtype)
        return same.t() if transposed else same

    def _product(self, number: int, *, backward: bool = False) -> Projection:
        """The product with an expert's weight alone."""
        made = self._products.get((number, backward))
        if made is None:
            weights = self.stack.weights
            base = (
                weights[number] if isinstance(weights, nn.ModuleList) else _Slice(self.stack, number, backward=backward)
            )
            made = Projection([Member(base, None)], 0.0, self.workspace, int8_units=self.int8_units)
            self._products[number, backward] = made
        return made
