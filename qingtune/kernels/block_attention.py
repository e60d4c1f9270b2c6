"""Causal attention over the segments of a layout, forward and backward: in C (native/attention.c) where that computes
numbers of the dtype, else as follows, a block of query rows at a time.

Query heads that share a key-value head are stacked, so that the products are large ones; scores exist for one block
at a time and are computed again in the backward pass. At 300 tokens a sample this is three times as fast on a CPU as
PyTorch's fused attention, at 4,000 it still is faster.

A window cuts the keys of a block short on the other side: those that none of its rows sees are not computed.

Products of 16-bit numbers are rounded to 16 bits, and scores are large where keys have a large part in common, as
Qwen2's biases give them. A softmax does not see what is common to all scores of a row, so each segment's mean key is
taken off its keys (as SageAttention does, Zhang et al. 2024, https://arxiv.org/abs/2410.02367): exact in theory, and
16-bit scores then are as good as 32-bit ones. Gradients stay the same, as those of a row's scores sum to zero.
None of that holds of scores that are capped: these keep their keys as they are, and are not computed in C.
"""

from __future__ import annotations

import math

import torch

from qingtune.kernels.architecture import Attention
from qingtune.kernels.block_sizes import gradient_sums
from qingtune.kernels.elementwise import cap_in_place
from qingtune.kernels.layout import Block, Blocks, Segment
from qingtune.kernels.native.attention import Given, attention_kernels
from qingtune.kernels.native.elementwise import native
from qingtune.kernels.workspace import Workspace

aten = torch.ops.aten


class BlockAttention:
    """Attention of one layer; queries, keys and values stay in the workspace under the layer's name."""

    def __init__(self, heads: Attention, workspace: Workspace) -> None:
        self.heads, self.workspace = heads, workspace

    def forward(
        self, name: str, blocks: Blocks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend: q [N, query heads, d], k and v [T, key-value heads, d] -> out [N, query heads * d].

        Backward finds what it needs under the name; blocks: query rows and the keys they see. q, k and v may be the
        workspace's buffers `q`, `k` and `v` of that name, and otherwise are copied there.
        """
        q, k, v = (self._keep(name + end, x) for end, x in ((".q", q), (".k", k), (".v", v)))
        if c := attention_kernels(self.heads, q.dtype, q.device):
            c.forward(Given(self.heads, blocks, q, k, v), out, self._lengths(name, len(q)))
            return
        keys, values = self._packed_keys(blocks, k, v)
        for (_, segment_blocks), key, value in zip(blocks, keys, values, strict=True):
            for block in segment_blocks:
                query = self._packed_block("attention.query", q, block)
                shares = self._shares(query, key, block)
                attended = self.workspace.take("attention.attended", query.shape, query.dtype)
                torch.bmm(shares, value[:, block.seen], out=attended)
                self._unpack(out[block.first : block.last], attended)

    def backward(
        self, name: str, blocks: Blocks, out: torch.Tensor, grad: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q [N, query heads, d], k and v [rows, key-value heads, d] for the gradient [N, query heads * d].

        Where a segment has several blocks or shares its beginning, gradients of keys and values are added up in fp32,
        and may stay so.

        Args:
            out: what forward gave.
        """
        heads, take, dtype = self.heads, self.workspace.take, grad.dtype
        q = take(name + ".q", (len(grad), heads.queries, heads.size), dtype)
        k, v = (take(name + end, (rows, heads.keys, heads.size), dtype) for end in (".k", ".v"))
        grad_q = take("attention.grad_q", q.shape, dtype)
        if c := attention_kernels(heads, dtype, grad.device):
            grad_k, grad_v = (take("attention.grad" + end, k.shape, dtype) for end in (".k", ".v"))
            numbers = gradient_sums(heads, sum(segment.keys for segment, _ in blocks))
            sums, lengths = take("attention.sums", (numbers,), torch.float32), self._lengths(name, len(q))
            c.backward(Given(heads, blocks, q, k, v), out, lengths, grad, (grad_q, grad_k, grad_v), sums)
            return grad_q, grad_k, grad_v
        wide = torch.promote_types(dtype, torch.float32)
        grad_k, grad_v = (take("attention.grad" + end, k.shape, wide).zero_() for end in (".k", ".v"))
        keys, values = self._packed_keys(blocks, k, v)
        for (segment, segment_blocks), key, value in zip(blocks, keys, values, strict=True):
            for block in segment_blocks:
                self._block_backward(segment, block, (q, key, value), grad, (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v

    def _block_backward(
        self,
        segment: Segment,
        block: Block,
        given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        grad: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Write a block's part of the first of the gradients, and add to the others.

        Args:
            given: q, and the segment's packed keys and values.
        """
        q, key, value = given
        grad_q, grad_k, grad_v = grads
        heads, take, dtype = self.heads, self.workspace.take, grad.dtype
        query = self._packed_block("attention.query", q, block)
        grad_out = self._packed_block("attention.attended", grad.view(-1, heads.queries, heads.size), block)
        shares = self._shares(query, key, block)
        self._add_rows(grad_v, segment, block, torch.bmm(shares.transpose(1, 2), grad_out))
        grad_shares = take("attention.scores", shares.shape, dtype)
        torch.bmm(grad_out, value[:, block.seen].transpose(1, 2), out=grad_shares)
        grad_scores = take("attention.grad_scores", shares.shape, dtype)
        aten._softmax_backward_data.out(grad_shares, shares, -1, dtype, grad_input=grad_scores)
        if heads.cap is not None:
            grad_scores.mul_(take("attention.slopes", shares.shape, dtype))
        key_part = torch.bmm(grad_scores.transpose(1, 2), query)
        self._add_rows(grad_k, segment, block, key_part, scale=heads.scale)
        torch.baddbmm(grad_out, grad_scores, key[:, block.seen], beta=0, alpha=heads.scale, out=grad_out)
        self._unpack(grad_q[block.first : block.last].view(block.last - block.first, -1), grad_out)

    def _shares(self, query: torch.Tensor, key: torch.Tensor, block: Block) -> torch.Tensor:
        """Softmax of the scores, [key heads, group * rows, keys]."""
        shape = (query.shape[0], query.shape[1], block.end - block.start)
        scores = self.workspace.take("attention.scores", shape, query.dtype)
        torch.baddbmm(scores, query, key[:, block.seen].transpose(1, 2), beta=0, alpha=self.heads.scale, out=scores)
        if (cap := self.heads.cap) is not None:
            cap_in_place(scores, cap, self.workspace.take("attention.slopes", shape, query.dtype))
        shares = self.workspace.take("attention.shares", shape, query.dtype)
        if c := native(scores):
            c.softmax(scores, block.spans, shares)
            return shares
        apart = scores.view(self.heads.keys, self.heads.group, -1, block.end - block.start)
        if block.end > block.masked_from:
            apart[..., block.masked_from - block.start :].masked_fill_(block.hidden, -math.inf)
        if passed := block.passed.shape[1]:
            apart[..., :passed].masked_fill_(block.passed, -math.inf)
        aten._softmax.out(scores, -1, False, out=shares)
        return shares

    def _keep(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What lies in the workspace under the name: x itself, or a copy."""
        kept = self.workspace.take(name, x.shape, x.dtype)
        return kept if x.data_ptr() == kept.data_ptr() and x.is_contiguous() else kept.copy_(x)

    def _lengths(self, name: str, rows: int) -> torch.Tensor:
        """What the backward in C needs of the softmax, fp32 [query heads, rows]."""
        return self.workspace.take(name + ".lengths", (self.heads.queries, rows), torch.float32)

    def _packed_block(self, name: str, x: torch.Tensor, block: Block) -> torch.Tensor:
        """A block's rows of [N, query heads, d] as [key heads, group * rows, d]."""
        heads, rows = self.heads, x[block.first : block.last]
        packed = self.workspace.take(name, (heads.keys, heads.group * len(rows), heads.size), x.dtype)
        apart = rows.view(-1, heads.keys, heads.group, heads.size).permute(1, 2, 0, 3)
        packed.view(heads.keys, heads.group, -1, heads.size).copy_(apart)
        return packed

    def _unpack(self, rows: torch.Tensor, packed: torch.Tensor) -> None:
        """[key heads, group * n, d] -> [n, query heads * d]."""
        heads = self.heads
        apart = packed.view(heads.keys, heads.group, -1, heads.size).permute(2, 0, 1, 3)
        rows.view(-1, heads.keys, heads.group, heads.size).copy_(apart)

    def _packed_keys(
        self, blocks: Blocks, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each segment's keys, less their mean, and values, [key heads, keys, d]."""
        keys, values = (self._packed(name, blocks, x) for name, x in (("attention.k", k), ("attention.v", v)))
        for key in keys if self.heads.cap is None else ():
            wide = torch.promote_types(key.dtype, torch.float32)
            torch.sub(key, key.mean(1, keepdim=True, dtype=wide), out=key)
        return keys, values

    def _packed(self, name: str, blocks: Blocks, x: torch.Tensor) -> list[torch.Tensor]:
        heads = self.heads
        sizes = [segment.keys * heads.keys for segment, _ in blocks]
        together = self.workspace.take(name, (sum(sizes), heads.size), x.dtype)
        parts = [part.view(heads.keys, -1, heads.size) for part in together.split(sizes)]
        for (segment, _), part in zip(blocks, parts, strict=True):
            part[:, : segment.shared].copy_(x[: segment.shared].transpose(0, 1))
            part[:, segment.shared :].copy_(x[segment.start : segment.end].transpose(0, 1))
        return parts

    def _add_rows(
        self, total: torch.Tensor, segment: Segment, block: Block, part: torch.Tensor, scale: float = 1.0
    ) -> None:
        """Add [key heads, keys of the block, d] to the rows of the shared beginning and of the segment."""
        rows, shared = part.transpose(0, 1), max(0, segment.shared - block.start)
        total[block.start : block.start + shared].add_(rows[:shared], alpha=scale)
        own, first = rows[shared:], segment.start + max(0, block.start - segment.shared)
        total[first : first + len(own)].add_(own, alpha=scale)
