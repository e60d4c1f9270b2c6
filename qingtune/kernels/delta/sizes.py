"""Sizes of the buffers that a gated delta net block takes (block.py), as kernels/buffers.py has those of others.

They are those of PyTorch's operations; where elementwise work is done in C, some are not needed.

Shapes: as in block.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.buffers import GroupSizes, Rows, Tally, Use

CHUNK = 64  # tokens that the delta rule takes at a time; why so many is in docs/performance.md


@dataclass(frozen=True)
class DeltaNetSizes:
    """Of block.DeltaNetBlock.

    Attributes:
        this: the layer.
        norm_trained: whether the weight of its own norm is trained.
        inputs: layers that give qkv, z, b and a; out: the one that reads what the gated norm gives.
    """

    this: DeltaNet
    norm_trained: bool
    inputs: GroupSizes
    out: GroupSizes

    def groups(self, rows: Rows) -> Sequence[Use]:
        """In the last layer z of fewer rows than the others."""
        qkv, z, b, a = (self.inputs.part(place, place + 1) for place in range(4))
        out = (self.out, "out", rows.asking)
        if not rows.last:
            return (self.inputs, "all", rows.tokens), out
        mixed = GroupSizes(qkv.reads, qkv.outs + b.outs + a.outs, qkv.ranks + b.ranks + a.ranks)
        return (mixed, "mixed", rows.tokens), (z, "z", rows.asking), out

    def kept(self, rows: Rows, slot: Tally) -> None:
        """What the projections give, what tokens read, and the states from which chunks start."""
        channels, values, heads, _ = self.inputs.outs
        slot.forward(rows.tokens * channels, "qkv")
        slot.forward(rows.asking * values, "z", "read")
        slot.forward(rows.tokens * heads, "b", "a")
        slot.forward((1 + rows.tokens // CHUNK) * self._state, "states")

    def passing(self, rows: Rows, tally: Tally) -> None:
        """The norm before it, gradients of what it keeps, and what a chunk of tokens takes."""
        wide, hidden = tally.how.wide, rows.tokens * self.inputs.reads
        channels, values = self.inputs.outs[:2]
        tally.forward(hidden, "norm.out")
        tally.forward(hidden, "norm.wide", itemsize=wide)
        tally.backward(hidden, "norm.scaled", "norm.product", itemsize=wide)
        tally.forward(rows.asking * values, "delta.gated")
        tally.forward(rows.tokens * values * rows.last, "delta.read")
        tally.backward(rows.asking * values, "delta.grad_z")
        tally.backward(rows.tokens * channels, "delta.grad_qkv")
        if rows.wanted:
            tally.backward(hidden, "delta.grad_normed", *["delta.grad_x"] * rows.last)
            tally.backward(rows.asking * self.inputs.reads * rows.last, "delta.grad_rows")
        self._chunk(rows, tally)
        at_a_time = min(CHUNK, rows.asking) * values
        tally.forward(at_a_time, "delta.normalised", "delta.gate", itemsize=wide)
        names = "delta.norm_grad", "delta.norm_active", "delta.norm_product", *["delta.norm_summed"] * self.norm_trained
        tally.backward(at_a_time, *names, itemsize=wide)

    @property
    def _state(self) -> int:
        return self.this.value_heads * self.this.key_size * self.this.value_size

    def _chunk(self, rows: Rows, tally: Tally) -> None:
        """What the recurrence takes for the tokens of a chunk."""
        this, wide, channels, count = self.this, tally.how.wide, self.inputs.outs[0], min(CHUNK, rows.longest)
        history, keys = this.kernel - 1, this.key_heads * this.key_size
        values, scores = count * self.inputs.outs[1], this.value_heads * count**2

        def forward(numbers: int, *names: str) -> None:
            tally.forward(numbers, *(f"delta.{name}" for name in names), itemsize=wide)

        def backward(numbers: int, *names: str) -> None:
            tally.backward(numbers, *(f"delta.{name}" for name in names), itemsize=wide)

        forward(this.kernel * channels, "taps")
        tally.forward((history + count) * channels, "delta.window")
        forward((history + count) * channels, "window")
        forward(count * channels, "mixed", "active")
        forward(count * 2 * this.key_heads, "rates")
        forward(count * 2 * keys, "kq")
        forward(values, "v", "missing", "added", "kept", "out")
        forward(2 * values, "reads")
        forward(scores, "within", "system", "solved")
        forward(2 * scores, "scores")
        forward(2 * this.key_heads * count**2, "products")
        forward(self._state, "state", "shared")
        backward((history + count) * channels, "grad_window")
        backward(count * 2 * keys, "kq_product", "grad_kq")
        backward(count * keys, "grad_k")
        backward(values, "grad_added", "grad_v")
        backward(2 * values, "grad_reads", "dots")
        backward(2 * scores, "grad_scores", "exponents")
        backward(self._state, "left_state", "shared_left_state", "state_product")
        backward(history * channels, "left_rows", "shared_left_rows")
        if rows.longest >= CHUNK and tally.how.itemsize < wide:
            self._narrow(tally)

    def _narrow(self, tally: Tally) -> None:
        """Factors of products, and a product, of a whole chunk."""
        this, values = self.this, CHUNK * self.inputs.outs[1]
        keys, pairs = CHUNK * this.key_heads * this.key_size, CHUNK**2 * this.key_heads
        scores = CHUNK**2 * this.value_heads

        def forward(numbers: int, *names: str) -> None:
            tally.forward(numbers, *(f"delta.narrow_{name}" for name in names))

        def backward(numbers: int, *names: str) -> None:
            tally.backward(numbers, *(f"delta.narrow_{name}" for name in names))

        forward(2 * keys, "kq")
        forward(self._state, "state")
        forward(scores, "shares", "solved")
        forward(values, "missing", "added", "kept")
        tally.forward(max(2 * pairs, 2 * values, self._state), "delta.product")
        backward(self._state, "grad_state")
        backward(values, "grad")
        backward(2 * values, "grad_reads")
        backward(2 * pairs, "weights")
        tally.backward(max(2 * keys, 2 * pairs), "delta.product")
