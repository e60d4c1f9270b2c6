"""A call of a group of layers and its plain twin, for test_projection.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qingtune.kernels.dropout import keep_mask
from qingtune.kernels.linear import Int8Linear, NF4Linear, QuantizedLinear
from qingtune.kernels.projection import Adapter, Member, Projection
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")
WIDTH = 64
# of the largest value of a tensor; bf16 rounds inputs of each product to 8 bits
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}


class _Int8Product(torch.autograd.Function):
    """What int8 units compute, in fp64: rows of the input and of the gradient rounded, weights as they are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed, scale)
        return rounded(x) @ (packed * scale.double()).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        packed, scale = ctx.saved_tensors
        return rounded(grads[0] * scale.t()) @ packed.double(), None, None


def rounded(x: torch.Tensor) -> torch.Tensor:
    scale = x.float().abs().amax(1, keepdim=True) / 127
    return (x.float() * scale.reciprocal()).round().double() * scale.double()


def make_base(kind: str, out: int, bias: bool, dtype: torch.dtype = torch.float32, trained: bool = False) -> Any:
    weight = torch.randn(out, WIDTH, dtype=torch.float64).to(dtype)
    vector = torch.randn(out, dtype=torch.float64).to(dtype) if bias else None
    if kind != "dense":
        return {"nf4": NF4Linear, "int8": Int8Linear}[kind](weight.float(), vector)
    layer = nn.Linear(WIDTH, out, bias=bias, dtype=dtype)
    layer.weight.data = weight
    if vector is not None:
        layer.bias.data = vector
    return layer.requires_grad_(trained)


def make_member(base: Any, rank: int, dtype: torch.dtype = torch.float32, dora: bool = False) -> Member:
    """Rank 0 for no adapter."""
    if not rank:
        return Member(base, None)
    a, b = (
        nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in ((rank, WIDTH), (base.out_features, rank))
    )
    magnitude = nn.Parameter(torch.rand(base.out_features, dtype=torch.float64).to(dtype) + 0.5) if dora else None
    return Member(base, Adapter(a, b, 0.5 * rank, magnitude))


@dataclass
class Call:
    """One call of a group: its inputs, and the plain computation in fp64."""

    members: list[Member]
    dtype: torch.dtype = torch.float64
    rows: int = 9
    dropout: float = 0.0
    add: bool = False
    int8_units: bool = False
    seed: int | None = field(init=False)

    def __post_init__(self) -> None:
        def random(width: int) -> torch.Tensor:
            return torch.randn(self.rows, width, dtype=torch.float64).to(self.dtype)

        self.seed = 1234 if self.dropout else None
        self.x = random(WIDTH)
        self.before, self.grads = ([random(member.shape[0]) for member in self.members] for _ in range(2))

    def parameters(self) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for member in self.members:
            found += [p for p in member.base.parameters() if p.requires_grad]
            found += [member.adapter.a, member.adapter.b] if member.adapter else []
            found += [member.magnitude] if member.magnitude is not None else []
        return found

    def plain(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs, and gradients of the input and of all trained parameters."""
        leaves = {id(p): leaf(p) for p in self.parameters()}

        def wide(p: torch.Tensor) -> torch.Tensor:
            return leaves.get(id(p), p.detach().double())

        x = leaf(self.x)
        dropped = x
        if self.seed is not None:
            mask, factor = keep_mask(x.shape, self.dropout, self.seed, CPU)
            dropped = x * mask * factor
        outs = []
        for member, before in zip(self.members, self.before, strict=True):
            base, adapter = member.base, member.adapter
            quantized = isinstance(base, QuantizedLinear)
            weight = (base.dequantize(self.dtype) if quantized else wide(base.weight)).double()
            if self.int8_units and isinstance(base, Int8Linear):
                y = _Int8Product.apply(x, base.packed, base.scale)
            else:
                y = x @ weight.t()
            if adapter:
                y = y + adapter.scaling * (dropped @ wide(adapter.a).t() @ wide(adapter.b).t())
            if adapter and adapter.magnitude is not None:
                norms = (weight + adapter.scaling * wide(adapter.b) @ wide(adapter.a)).norm(dim=1)
                y = y * wide(adapter.magnitude) / norms.detach()
            if base.bias is not None:
                y = y + wide(base.bias)
            outs.append(y + before.double() if self.add else y)
        total = sum((y * grad.double()).sum() for y, grad in zip(outs, self.grads, strict=True))
        return [y.detach() for y in outs], list(torch.autograd.grad(total, [x, *leaves.values()]))

    def projection(self, workspace: Workspace) -> Projection:
        return Projection(self.members, self.dropout, workspace, int8_units=self.int8_units)

    def forward(self, workspace: Workspace, name: str = "a") -> list[torch.Tensor]:
        outs = [y.clone() if self.add else torch.full_like(y, torch.nan) for y in self.before]
        self.projection(workspace).forward(name, self.x, outs, self.seed, add=self.add)
        return outs

    def backward(self, workspace: Workspace, name: str = "a", wanted: bool = True) -> torch.Tensor | None:
        grad_x = torch.full_like(self.x, torch.nan) if wanted else None
        self.projection(workspace).backward(name, self.x, self.grads, grad_x, self.seed)
        return grad_x


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float64, copy=True).requires_grad_()


def close(mine: torch.Tensor | None, twin: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert mine is not None
    assert mine.shape == twin.shape
    bound = factor * BOUNDS[dtype] * max(1.0, float(twin.abs().max()))
    torch.testing.assert_close(mine.detach().double(), twin, rtol=0, atol=bound)


def check(call: Call, workspace: Workspace | None = None, wanted: bool = True, factor: float = 1.0) -> None:
    workspace = workspace or Workspace(CPU)
    for parameter in call.parameters():
        parameter.grad = None
    kept = call.x.clone(), [grad.clone() for grad in call.grads]
    with torch.no_grad():
        outs, grad_x = call.forward(workspace), call.backward(workspace, wanted=wanted)
    twin_outs, (twin_grad_x, *twin_grads) = call.plain()
    for mine, twin in zip(outs, twin_outs, strict=True):
        close(mine, twin, call.dtype, factor)
    if wanted:
        close(grad_x, twin_grad_x, call.dtype, factor)
    for parameter, twin in zip(call.parameters(), twin_grads, strict=True):
        close(parameter.grad, twin, call.dtype, factor)
    assert call.x.equal(kept[0])
    assert all(grad.equal(before) for grad, before in zip(call.grads, kept[1], strict=True))
