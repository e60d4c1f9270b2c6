"""A decoder's weights for answering: matrices, y = x W^T + b, dense or held and multiplied in 8 or 4 bits.

A new token is one row, for which reading the weights is all the work: their bytes decide the speed. Where many rows
come at once (a prompt), packed weights are unpacked into a buffer and multiplied by a dense product.

PyTorch multiplies packed weights by vector units in bf16 alone, whether or not the CPU has units for it: fp32 and fp16
go through a loop over single numbers, 15 to 30 times as slow and slower than a dense product. So what a few rows are
multiplied with is rounded to bf16.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten
GROUP_SIZE = 32  # weights of a row that share a scale and an offset in 4 bits
INT4_ROWS = 64  # the packed form's blocks; rows are filled up to a multiple
ROWS_AT_A_TIME = 8192  # rounded at once: what that takes for a moment is several times the weight
# From how many rows on unpacking pays; below, packed products go through all weights once for a few rows.
UNPACK_FROM = {8: 16, 4: 96}


class Matrix(Protocol):
    """A weight [N, K] with an optional bias [N]."""

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N], in x's dtype; what is added is [T, N] too."""
        ...


class DenseMatrix:
    """A weight as it is; on a CPU in oneDNN's own layout, with which products of one row read memory twice as fast."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self._reordered = weight.device.type == "cpu" and _can_reorder(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._reordered else weight

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        if not self._reordered:
            return plus(F.linear(x, self._weight, self.bias), added)
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, self._weight, self.bias, "add")


def _can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes the dtype on this CPU: 16 bits need AVX-512 or newer."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


class Int8Matrix:
    """int8 with a scale a row, the largest value of a row at 127.

    Args:
        dtype: of what it is multiplied with.
        units: whether rows of what it is multiplied with are rounded to int8 too, for the CPU's int8 units.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *, units: bool) -> None:
        parts = [round_to_int8(rows) for rows in weight.split(ROWS_AT_A_TIME)]
        packed, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self.bias, self.units = bias, units
        self._packed: Any = _packed_for_units(packed, scale) if units else packed
        self.scale = scale.to(dtype)
        self._ones = torch.ones(len(packed), dtype=torch.bfloat16)

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        if self.units:
            return plus(self._product_of_bytes(x.float()).to(x.dtype), self.bias, added)
        if len(x) < UNPACK_FROM[8]:
            y = aten._weight_int8pack_mm(x.bfloat16(), self._packed, self._ones).to(x.dtype)
            return plus(y.mul_(self.scale), self.bias, added)
        return plus((x @ self._packed.to(x.dtype).t()).mul_(self.scale), self.bias, added)

    def _product_of_bytes(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, K] -> [T, N]; the library rounds all rows by one scale, so they are brought to one size first."""
        if len(x) == 1:
            return torch.ops.quantized.linear_dynamic(x, self._packed)
        largest = x.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        return torch.ops.quantized.linear_dynamic(x / largest, self._packed).mul_(largest)


def _packed_for_units(numbers: torch.Tensor, scale: torch.Tensor) -> Any:
    """int8 [N, K] and fp32 scales [N] as FBGEMM, which comes with PyTorch for x86, multiplies them."""
    zeros = torch.zeros(len(numbers), dtype=torch.int64)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this way of quantising models may be taken out of PyTorch one day
            # By PyTorch's name for it in Python, where warnings can be silenced; below that they are printed.
            weight = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateUsage]
                numbers, scale.double(), zeros, 0
            )
            return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = before


def round_to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, K] in int8, the largest value of each at 127, and their scales, fp32 [N]."""
    wide = rows.float()
    scale = wide.abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round_().to(torch.int8), scale


class Int4Matrix:
    """16 steps between the least and the largest of each 32 weights of a row, in the layout of PyTorch's CPU kernels.

    Args:
        weight: [N, K], K a multiple of 32.
        dtype: of what it is multiplied with.
        workspace: holds it unpacked for as long as a product of many rows takes.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self.rows, self.columns = weight.shape
        self.dtype = dtype
        parts = [_packed_int4(rows) for rows in weight.split(ROWS_AT_A_TIME)]
        self.packed, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        self.scales_and_middles = scales.transpose(0, 1).contiguous()  # [K / 32, N, 2]
        self.bias, self.workspace = bias, workspace

    def dense(self) -> torch.Tensor:
        """The unpacked weight, transposed: [K, N filled up], until the next matrix is unpacked."""
        scale, middle = self.scales_and_middles.to(self.dtype).unbind(2)
        half = INT4_ROWS // 2
        blocks = self.packed.view(-1, self.columns, half).transpose(0, 1)  # [K, N / 64, 32 pairs]
        out = self.workspace.take("unpacked", (self.columns, scale.shape[1]), self.dtype)
        apart = out.view(self.columns, -1, 2, half)
        apart[:, :, 0].copy_(blocks & 15)
        apart[:, :, 1].copy_(blocks >> 4)
        grouped = out.view(len(scale), GROUP_SIZE, -1)
        torch.addcmul((middle - 8 * scale)[:, None], grouped, scale[:, None], out=grouped)
        return out

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        if len(x) >= UNPACK_FROM[4]:
            y = x @ self.dense()
        else:
            packed, scales = self.packed, self.scales_and_middles
            y = aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP_SIZE, scales).to(x.dtype)
        return plus(y[:, : self.rows], self.bias, added)


def plus(y: torch.Tensor, *parts: torch.Tensor | None) -> torch.Tensor:
    """y itself, with what there is added to it."""
    for part in parts:
        if part is not None:
            y.add_(part)
    return y


def _packed_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up to a multiple of 64 in PyTorch's layout, and scales and middles [N, K / 32, 2]."""
    numbers, scale, middle = round_to_int4(F.pad(weight, (0, 0, 0, -len(weight) % INT4_ROWS)))
    return aten._convert_weight_to_int4pack_for_cpu(numbers, 1), torch.stack([scale, middle], 2)


def round_to_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, K] as numbers of 0..15, int32 [N, K], and scales and middles (the value of 8), bf16 [N, K / 32]."""
    groups = rows.float().view(len(rows), -1, GROUP_SIZE)
    least, largest = groups.aminmax(dim=2)
    scale = ((largest - least) / 15).clamp_min(1e-6).bfloat16()  # rounded first, to find the best numbers for it
    middle = (least + 8 * scale.float()).bfloat16()
    numbers = (groups - middle.float()[..., None]).div_(scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return numbers.view(rows.shape).int(), scale, middle


@functools.cache
def has_int4_kernels() -> bool:
    """Whether this machine's PyTorch packs 4 bits in the layout that `Int4Matrix.dense` unpacks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * INT4_ROWS, 2 * GROUP_SIZE, generator=generator)
    try:
        matrix = Int4Matrix(weight, None, torch.float32, Workspace(torch.device("cpu")))
        x = torch.randn(3, weight.shape[1], generator=generator)
        wanted = x @ matrix.dense()
        return bool((matrix.multiply(x) - wanted).norm() < 0.02 * wanted.norm())
    except RuntimeError:  # no such kernels on this machine; the caller reports why the general ones are used
        return False


def pack(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int | None,
    dtype: torch.dtype,
    workspace: Workspace,
    *,
    int8_units: bool,
) -> Matrix:
    """A matrix that holds a weight [N, K] in 4 or 8 bits, or with None in the dtype.

    Where 4 bits do not fit the shape, 8 are taken.
    """
    bias = None if bias is None else bias.to(dtype)
    if bits is None:
        return DenseMatrix(weight.to(dtype), bias)
    if bits == 4 and weight.shape[1] % GROUP_SIZE == 0:
        return Int4Matrix(weight, bias, dtype, workspace)
    return Int8Matrix(weight, bias, dtype, units=int8_units)
