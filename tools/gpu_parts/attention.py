"""Attention as a GPU computes it against plain products in fp64: forward and gradients."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch

from gpu_parts.scale import Result, Scale
from qingtune.kernels import flash_attention
from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_attention import BlockAttention
from qingtune.kernels.flash_attention import FlashAttention
from qingtune.kernels.layout import Layout, Segment
from qingtune.kernels.workspace import Workspace

LENGTHS = (300, 1, 40, 700)
BOUND = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-5}  # of the largest value


def part(scale: Scale) -> Result:
    """Each kind of attention that this device has, with and without a shared beginning, a window, large heads."""
    result = Result()
    for kind in (FlashAttention, BlockAttention):
        for heads in (Attention(14, 2, 64, 0.125), Attention(8, 8, 128, 0.088), Attention(4, 2, 64, 0.125, window=50)):
            for shared in (0, 40):
                if kind is FlashAttention and not flash_attention.fits(scale.device, scale.hardware.dtype, heads.size):
                    continue
                _compare(kind, heads, shared, scale, result)
    return result


def _compare(kind: Any, heads: Attention, shared: int, scale: Scale, result: Result) -> None:
    dtype, device = scale.hardware.dtype, scale.device
    layout = _layout(shared, device)
    tokens = len(layout.token_ids)
    draw = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(tokens, heads.queries, heads.size, generator=draw) for _ in range(2))
    k, v = (torch.randn(tokens, heads.keys, heads.size, generator=draw) for _ in range(2))
    found, exact = (
        _run(which, heads, layout, *(x.to(where, wanted) for x in (q, k, v, grad)))
        for which, wanted, where in ((kind, dtype, device), (BlockAttention, torch.float64, torch.device("cpu")))
    )
    names = ("out", "grad_q", "grad_k", "grad_v")
    errors = {
        name: float((mine.double().cpu() - right).abs().max() / right.abs().max())
        for name, mine, right in zip(names, found, exact, strict=True)
    }
    title = (
        f"{kind.__name__}, heads {heads.queries}/{heads.keys} of {heads.size}, window {heads.window}, shared {shared}"
    )
    result.rows.append({"attention": title, **errors})
    result.faults.extend(f"{title}: {name} off by {e:.2g}" for name, e in errors.items() if not e < BOUND[dtype])


def _layout(shared: int, device: torch.device) -> Layout:
    edges = [*accumulate(LENGTHS, initial=shared)]
    segments = [Segment(start, end, shared) for start, end in pairwise(edges)]
    places = torch.zeros(edges[-1], dtype=torch.int64, device=device)
    return Layout(places, places, tuple([Segment(0, shared, 0), *segments] if shared else segments), places, places)


def _run(
    kind: Any,
    heads: Attention,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    attention = kind(heads, Workspace(q.device))
    where = layout.lengths if kind is FlashAttention else layout.blocks(heads.window)
    if q.device != layout.token_ids.device:
        moved = layout.token_ids.to(q.device)
        where = Layout(moved, moved, layout.segments, moved, moved).blocks(heads.window)
    out = torch.empty(len(q), heads.queries * heads.size, device=q.device, dtype=q.dtype)
    attention.forward("a", where, q, k, v, out)
    return [out, *(x.clone() for x in attention.backward("a", where, out, grad.flatten(1), len(q)))]
