"""Products of int8 matrices with a scale a row: by the CPU's int8 units twice the rate of bf16 and four times that of
fp32, and where there is AVX2 alone, as pairs of 16 bits, 1.5 times that of fp32.

Weights have a scale an output row (kernels/linear.Int8Linear); activations and gradients get one a token, computed
each time (vector-wise quantisation, Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outlier
columns).
"""

from __future__ import annotations

import torch

from qingtune.kernels.device import has_int8_units
from qingtune.kernels.footprint import INT8_TILE as TILE
from qingtune.kernels.native import int8_products
from qingtune.kernels.native.elementwise import native
from qingtune.kernels.workspace import Workspace


def multiplies_int8(device: torch.device) -> bool:
    """Whether int8 weights are multiplied as such there, instead of in another format."""
    return device.type == "cpu" and (has_int8_units(device) or int8_products.in_c())


def quantize_rows(
    x: torch.Tensor, columns: torch.Tensor | None, workspace: Workspace, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to int8, each row's largest value at 127.

    Args:
        x: [T, K].
        columns: fp32 [K], multiplied in first; None for ones.
        name: under which the workspace holds the result until it is taken again.

    Returns:
        int8 [T, K] and fp32 scales [T, 1].
    """
    packed = workspace.take(name + ".packed", x.shape, torch.int8)
    scales = workspace.take(name + ".scales", (len(x), 1), torch.float32)
    if c := native(x):
        c.quantize_rows(x, columns, packed, scales)
        return packed, scales
    tile = workspace.take("int8.tile", (min(TILE, len(x)), x.shape[1]), torch.float32)
    for start in range(0, len(x), TILE):
        rows, scale = x[start : start + TILE], scales[start : start + TILE]
        wide = tile[: len(rows)]
        wide.copy_(rows)  # no product of two dtypes, which would be converted into fresh memory first
        if columns is not None:
            wide.mul_(columns)
        torch.maximum(wide.amax(1, keepdim=True), wide.amin(1, keepdim=True).neg_(), out=scale)
        scale.div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
        packed[start : start + TILE].copy_(wide.mul_(scale.reciprocal()).round_())
    return packed, scales


def int8_product(
    packed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    add: bool,
) -> None:
    """out (+)= scales * (packed @ weight) * columns.

    Args:
        packed: int8 [T, K].
        scales: fp32 [T, 1].
        weight: int8 [K, N], of any strides.
        columns: fp32 [N]; None for ones.
        out: [T, N].
        add: add to what out holds instead of replacing it.
    """
    if int8_products.fits(packed, weight, out):
        room = workspace.take("int8.room", (int8_products.room_bytes(*packed.shape),), torch.uint8)
        int8_products.multiply(packed, scales, weight, columns, out, room, add=add)
        return
    shape = (len(packed), weight.shape[1])
    sums = workspace.take("int8.sums", shape, torch.int32)
    torch.ops.aten._int_mm.out(packed, weight, out=sums)
    if c := native(out):
        c.scale_sums(sums, scales, columns, out, add=add)
        return
    wide = workspace.take("int8.wide", shape, torch.float32).copy_(sums)
    if columns is not None:
        wide.mul_(columns)
    if add:
        out.addcmul_(wide, scales) if out.dtype == wide.dtype else out.add_(wide.mul_(scales))
    else:
        out.copy_(wide.mul_(scales))
