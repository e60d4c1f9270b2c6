"""The recurrence of a gated delta net over the samples of a pass, from what its projections give to what tokens read.

In C where that is there for the tensors (native/delta_rule.py), a head at a time through all chunks; otherwise a chunk
of tokens of all heads at a time, so that what is wide stays in the caches. Samples that share a beginning start from
the state after it.

Shapes: as in block.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.delta.heads import DeltaHeads
from qingtune.kernels.delta.rule import EPSILON, DeltaRule
from qingtune.kernels.delta.sizes import CHUNK
from qingtune.kernels.layout import Layout, Segment
from qingtune.kernels.native.delta_rule import Given, delta_rule
from qingtune.kernels.workspace import Workspace


class Recurrence:
    """Of one layer.

    Args:
        this: its sizes.
        weight: of the convolution, [M, 1, w].
        workspace: for buffers.
        dtype: of rows, in which factors of products are too; all else is in fp32, or fp64 for fp64.
    """

    def __init__(self, this: DeltaNet, weight: torch.Tensor, workspace: Workspace, dtype: torch.dtype) -> None:
        self.this, self.workspace, self.wide = this, workspace, torch.promote_types(dtype, torch.float32)
        self.heads = DeltaHeads(this, weight, workspace, dtype)
        # Each number of rows has oneDNN make 16-bit kernels of its own: short chunks are computed in fp32.
        self.rule, self.short_rule = (DeltaRule(workspace, self.wide, products) for products in (dtype, None))

    def states(self, slot: str, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """The state after a shared beginning, then those at the starts of chunks within samples, [..., K, d, R, e]
        (in C [..., K, R, d, e])."""
        return self.workspace.take(slot + ".states", (1 + tokens // CHUNK, *self._state_shape), dtype)

    def forward(
        self,
        layout: Layout,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        states: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write what each token reads, and the states.

        Args:
            layout: where samples lie.
            qkv: [T, M].
            decay: g, [K, R, T], wide; beta likewise.
            states: see there; in qkv's dtype.
            out: [T, H e], in qkv's dtype.
        """
        taps = self.heads.taps()
        if kernels := delta_rule(self.this, qkv, states, out):
            kernels.forward(Given(self.this, layout, qkv, taps, decay, beta, states, EPSILON), out)
            return
        state, after_shared = self._state("state"), self._state("shared")
        for chunk in _chunks(layout):
            if chunk.first > chunk.segment.start:
                states[chunk.state].copy_(state)
            else:
                _start(state, after_shared if chunk.segment.shared else None)
            kq, v = self.heads.forward(self._window(qkv, chunk), taps)
            here = slice(chunk.first, chunk.last)
            read = self._rule(chunk).forward(kq, v, decay[..., here].cumsum(-1), beta[..., here], state)
            out[here].view(-1, *state.shape[:1], *state.shape[2:]).copy_(read.transpose(0, 1))
            if chunk.last == layout.segments[0].end:
                states[0].copy_(after_shared.copy_(state))

    def backward(
        self,
        layout: Layout,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        states: torch.Tensor,
        grad: torch.Tensor,
        grad_qkv: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of g and log beta; that of qkv is written to grad_qkv, the convolution's added to its weight's.

        grad: of what forward wrote to out; the others as forward takes and leaves them.
        """
        taps = self.heads.taps()
        grad_taps = torch.zeros_like(taps) if self.heads.weight.requires_grad else None
        if kernels := delta_rule(self.this, qkv, states, grad, grad_qkv):
            given = Given(self.this, layout, qkv, taps, decay, beta, states, EPSILON)
            found = kernels.backward(given, grad, grad_qkv, grad_taps)
        else:
            found = self._backward(layout, (qkv, taps, decay, beta, states), grad, grad_qkv, grad_taps)
        if grad_taps is not None:
            self.heads.add_weight_gradient(grad_taps)
        return found

    def _backward(
        self,
        layout: Layout,
        given: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        grad_qkv: torch.Tensor,
        grad_taps: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As backward, in PyTorch; given: qkv, taps, g, beta and states."""
        qkv, taps, decay, beta, states = given
        grad_decay, grad_beta, state = torch.empty_like(decay), torch.empty_like(beta), self._state("state")
        # Gradients of what a chunk leaves to the next one: its state, and its last rows for the convolution.
        left = _Left(self._state("left_state"), self._rows("left_rows"))
        left_by_shared = _Left(self._state("shared_left_state"), self._rows("shared_left_rows")).zero_()
        for chunk in reversed(list(_chunks(layout))):
            if chunk.last == chunk.segment.end:
                left.start(left_by_shared if chunk.segment.start == 0 else None)
            here, window = slice(chunk.first, chunk.last), self._window(qkv, chunk)
            kq, v = self.heads.forward(window, taps)
            grad_out = grad[here].view(-1, *state.shape[:1], *state.shape[2:]).transpose(0, 1)
            _start(state, None if chunk.state is None else states[chunk.state])
            sums = decay[..., here].cumsum(-1)
            found = self._rule(chunk).backward(grad_out, kq, v, sums, beta[..., here], state, left.state)
            grad_decay[..., here], grad_beta[..., here] = found[2:]
            grad_window = self.heads.backward(*found[:2], window, kq, taps, grad_taps)
            grad_window[len(grad_window) - self.heads.history :].add_(left.rows)
            grad_qkv[here].copy_(grad_window[self.heads.history :])
            left.rows.copy_(grad_window[: self.heads.history])
            if chunk.first == chunk.segment.start and chunk.segment.shared:
                left_by_shared.add_(left)
        return grad_decay, grad_beta

    def _rule(self, chunk: _Chunk) -> DeltaRule:
        return self.rule if chunk.last - chunk.first == CHUNK else self.short_rule

    def _window(self, qkv: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """A chunk's rows after those before them, [w - 1 + n, M]; where a sample starts, those of its shared part."""
        history, segment = self.heads.history, chunk.segment
        window = self.heads.window(chunk.last - chunk.first)
        end = segment.shared if chunk.first == segment.start else chunk.first
        there = min(history, end)
        window[: history - there].zero_()
        window[history - there : history].copy_(qkv[end - there : end])
        window[history:].copy_(qkv[chunk.first : chunk.last])
        return window

    def _state(self, name: str) -> torch.Tensor:
        return self.workspace.take("delta." + name, self._state_shape, self.wide)

    def _rows(self, name: str) -> torch.Tensor:
        return self.workspace.take("delta." + name, (self.heads.history, len(self.heads.weight)), self.wide)

    @property
    def _state_shape(self) -> tuple[int, int, int, int]:
        this = self.this
        return this.key_heads, this.key_size, this.value_heads // this.key_heads, this.value_size


@dataclass(frozen=True)
class _Chunk:
    """Tokens first..last of the layout, all of one segment; which of the kept states it starts from, None for zero."""

    segment: Segment
    first: int
    last: int
    state: int | None


def _chunks(layout: Layout) -> Iterator[_Chunk]:
    kept = 0
    for segment in layout.segments:
        yield _Chunk(segment, segment.start, min(segment.start + CHUNK, segment.end), 0 if segment.shared else None)
        for first in range(segment.start + CHUNK, segment.end, CHUNK):
            kept += 1
            yield _Chunk(segment, first, min(first + CHUNK, segment.end), kept)


def _start(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    """Write what a sequence starts from, zero for None."""
    if value is None:
        tensor.zero_()
    else:
        tensor.copy_(value)


@dataclass(frozen=True)
class _Left:
    """Gradients of what a chunk leaves to the next: its state [K, d, R, e] and its last rows [w - 1, M]."""

    state: torch.Tensor
    rows: torch.Tensor

    def start(self, other: _Left | None) -> None:
        _start(self.state, other and other.state)
        _start(self.rows, other and other.rows)

    def zero_(self) -> _Left:
        self.start(None)
        return self

    def add_(self, other: _Left) -> None:
        self.state.add_(other.state)
        self.rows.add_(other.rows)
