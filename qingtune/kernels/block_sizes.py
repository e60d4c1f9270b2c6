"""What each kind of block takes memory for, as buffers.py counts it; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.kernels.architecture import Attention
from qingtune.kernels.buffers import GroupSizes, Rows, Tally, Use
from qingtune.kernels.footprint import QUERY_BLOCK


def gradient_sums(this: Attention, keys: int) -> int:
    """Numbers of the sums for gradients of all segments' keys and values, which each query head has in C."""
    return 2 * this.queries * keys * -(-this.size // 32) * 32


@dataclass(frozen=True)
class AttentionSizes:
    """Of attention_block.AttentionBlock.

    Attributes:
        this: its shape.
        qkv: layers that give queries, keys and values; o: the one that reads what was attended.
        normed_output: whether what o gives is normed.
    """

    this: Attention
    qkv: GroupSizes
    o: GroupSizes
    normed_output: bool

    def groups(self, rows: Rows) -> Sequence[Use]:
        """In the last layer queries of fewer rows than keys and values."""
        o = (self.o, "o", rows.asking)
        if rows.last and not self.this.fused:
            return (self.qkv.part(0, 1), "q", rows.asking), (self.qkv.part(1), "kv", rows.tokens), o
        return (self.qkv, "qkv", rows.tokens), o

    def kept(self, rows: Rows, slot: Tally) -> None:
        """Queries, keys and values, what was attended, and queries and keys before their norms."""
        queries, keys = self._numbers(rows)
        slot.forward(rows.asking * self.qkv.reads * self.normed_output, "o.out")
        slot.forward(queries, "q", "attended")
        slot.forward(queries * (1 + self.this.gated) * (self.this.normed or self.this.gated), "raw_q")
        slot.forward(keys, "k", "v", *["raw_k"] * self.this.normed)
        slot.forward(rows.asking * self.this.queries * self._in_c(slot), "lengths", itemsize=4)

    def passing(self, rows: Rows, tally: Tally) -> None:
        """Its norms, queries and keys on their way, and what attention takes itself."""
        hidden = rows.tokens * self.qkv.reads
        queries, keys = self._numbers(rows)
        tally.norm(hidden)
        tally.forward(hidden, "norm.out")
        if self.this.normed:
            for numbers, name in ((queries, "norm.q"), (keys, "norm.k")):
                tally.norm(numbers)
                tally.forward(numbers, name)
        turned = tally.backward if tally.how.on_cpu else tally.forward  # there they are kept
        turned(queries, "attention.rotated.q")
        turned(keys, "attention.rotated.k")
        if self.this.fused:
            tally.forward(rows.tokens * self.qkv.outs[0], "attention.raw_qkv")
            tally.backward(rows.tokens * self.qkv.outs[0], "attention.grad_qkv")
        else:
            tally.forward(queries * (not self.this.normed and not self.this.gated), "attention.raw_q")
            tally.forward(keys * (not self.this.normed), "attention.raw_k")
            tally.forward(keys * (not tally.how.on_cpu), "attention.raw_v")
        tally.backward(rows.asking * self.qkv.reads * self.normed_output, "residual.grad")
        tally.backward(queries, "attention.grad_q", "attention.grad_out")
        tally.forward(queries * self.this.gated, "attention.gated", "attention.sigmoid")
        tally.backward(queries * 2 * self.this.gated, "attention.grad.raw_q")
        if rows.wanted:
            tally.backward(hidden, "attention.grad_normed", *["attention.grad_x"] * rows.last)
            apart = rows.last and not self.this.fused
            tally.backward(rows.asking * self.qkv.reads * apart, "attention.grad_rows")
        self._attention(rows, tally)

    def _attention(self, rows: Rows, tally: Tally) -> None:
        """Sums for gradients of keys, and in PyTorch packed keys and values, and scores of a block of rows."""
        keys = self._numbers(rows)[1]
        if self._in_c(tally):
            tally.backward(keys, "attention.grad.k", "attention.grad.v")
            tally.backward(gradient_sums(self.this, rows.tokens), "attention.sums", itemsize=4)
            return
        tally.backward(keys, "attention.grad.k", "attention.grad.v", itemsize=tally.how.wide)
        if tally.how.on_cpu or self.this.cap is not None:
            block = -(-rows.longest // max(1, -(-rows.longest // QUERY_BLOCK)))
            window, seen = self.this.window, rows.longest
            if window is not None and not rows.last:  # there rows that ask may lie far apart
                seen = min(seen, window + block - 1)
            tally.forward(keys, "attention.k", "attention.v")
            tally.forward(block * self.o.reads, "attention.query", "attention.attended")
            tally.forward(self.this.queries * block * seen, "attention.scores", "attention.shares")
            tally.forward(self.this.queries * block * seen * (self.this.cap is not None), "attention.slopes")
            tally.backward(self.this.queries * block * seen, "attention.grad_scores")

    def _in_c(self, tally: Tally) -> bool:
        return tally.how.on_cpu and tally.how.attention_in_c and self.this.cap is None

    def _numbers(self, rows: Rows) -> tuple[int, int]:
        """Of queries, and of keys."""
        return rows.asking * self.this.queries * self.this.size, rows.tokens * self.this.keys * self.this.size


@dataclass(frozen=True)
class MLPSizes:
    """Of mlp_block.MLPBlock.

    Attributes:
        gate_up: layers that give gate and up; down: the one that reads the hidden layer.
        normed_output: whether what down gives is normed.
    """

    gate_up: GroupSizes
    down: GroupSizes
    normed_output: bool

    def groups(self, rows: Rows) -> Sequence[Use]:
        """Both read all rows that go on."""
        return (self.gate_up, "gate_up", rows.asking), (self.down, "down", rows.asking)

    def kept(self, rows: Rows, slot: Tally) -> None:
        """Gate and up."""
        slot.forward(rows.asking * self.down.reads, "gate", "up")
        slot.forward(rows.asking * self.gate_up.reads * self.normed_output, "down.out")

    def passing(self, rows: Rows, tally: Tally) -> None:
        """Its norm and the hidden layer."""
        hidden, inner = rows.asking * self.gate_up.reads, rows.asking * self.down.reads
        tally.norm(hidden)
        tally.forward(hidden, "norm.out")
        tally.forward(inner, "mlp.hidden")
        tally.backward(inner, "mlp.activated", "mlp.grad_hidden")
        tally.backward(hidden, "mlp.grad_normed")
        tally.backward(hidden * self.normed_output, "residual.grad")
        if len(self.gate_up.outs) == 1:
            tally.forward(rows.asking * self.gate_up.outs[0], "mlp.gate_up")
