"""Sizes of the buffers that a mixture of experts takes, as buffers.py has those of other blocks: no torch.

How many tokens an expert gets is known in a pass only, so its buffers are for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.kernels.buffers import GroupSizes, Rows, Tally, Use, product_buffers
from qingtune.kernels.footprint import low_rank_room


def filled_up(rows: int, beyond: int | None = 0) -> int:
    """What an expert's number of rows is filled up to, so that there are few: a multiple of 8, or of an eighth of the
    next power of two. Up to `beyond` it stays as it is; always if that is None."""
    if beyond is None or rows <= beyond:
        return rows
    step = max(8, 1 << (rows - 1).bit_length() >> 3)
    return -(-rows // step) * step


@dataclass(frozen=True)
class StackSizes:
    """Of matrices.ExpertMatrices.

    Attributes:
        reads: in features of an expert's matrix.
        out: its out features.
        rank: of its adapter, 0 where there is none.
        trained: whether it is trained itself.
    """

    reads: int
    out: int
    rank: int
    trained: bool

    def fit_words(self, itemsize: int) -> bool:
        """Whether adapters' products in C take these sizes, for numbers of so many bytes."""
        return GroupSizes(self.reads, (self.out,), (self.rank,)).fit_words(itemsize)

    def passing(self, rows: int, tally: Tally) -> None:
        """What products take in addition to inputs and outputs; rows: of an expert, at most."""
        how = tally.how
        product_buffers(GroupSizes(self.reads, (self.out,), (0,)), rows, tally)
        if how.low_rank_in_c and self.fit_words(how.itemsize):
            tally.forward(
                low_rank_room(self.reads, self.rank, how.itemsize) * (self.rank > 0), "experts.room", itemsize=4
            )
            tally.backward(
                low_rank_room(self.out, self.rank, how.itemsize) * (self.rank > 0), "experts.room", itemsize=4
            )
        else:
            if how.itemsize != 4:  # adapters are fp32
                tally.forward(self.rank * max(self.reads, self.out), "experts.adapter")
            for itemsize in {how.itemsize, how.wide}:
                tally.backward(self.rank * max(self.reads, self.out), "product", itemsize=itemsize)
        if self.trained and not how.trains_weights:  # modules_to_save: fp32
            for itemsize in {how.itemsize, how.wide}:
                tally.backward(self.reads * self.out, "product", itemsize=itemsize)


@dataclass(frozen=True)
class ExpertsSizes:
    """Of experts.ExpertsBlock.

    Attributes:
        count: experts.
        chosen: by each token.
        gate_up: gates and ups as one matrix.
        down: what reads the hidden layer.
        router_itemsize: bytes a number of the router's weight.
        trains_router: whether that is trained.
        fills_beyond: rows of an expert beyond which they are filled up; None if they never are.
        shared: layers that read the shared expert's input, and the one that reads its hidden layer; None without it.
    """

    count: int
    chosen: int
    gate_up: StackSizes
    down: StackSizes
    router_itemsize: int
    trains_router: bool
    fills_beyond: int | None
    shared: tuple[GroupSizes, GroupSizes] | None

    def groups(self, rows: Rows) -> Sequence[Use]:
        """The shared expert's."""
        if self.shared is None:
            return ()
        return (self.shared[0], "shared", rows.asking), (self.shared[1], "shared_down", rows.asking)

    def kept(self, rows: Rows, slot: Tally) -> None:
        """Logits of the router, gates and ups, and what adapters keep."""
        sent = rows.asking * self.chosen
        slot.forward(rows.asking * self.count, "router")
        slot.forward(sent * self.down.reads, "gate", "up")
        slot.forward(sent * self.gate_up.rank, "gate_up.low")
        slot.forward(sent * self.down.rank, "down.low")
        if self.shared:
            slot.forward(rows.asking * self.shared[1].reads, "shared_gate", "shared_up")
            slot.forward(rows.asking, "shared_share")

    def passing(self, rows: Rows, tally: Tally) -> None:
        """The norm, an expert's rows, and what each token gets from its experts."""
        how, tokens = tally.how, rows.asking
        hidden = tokens * self.gate_up.reads
        most = filled_up(tokens, self.fills_beyond)  # of an expert
        inner = max(most * self.down.reads, tokens * self.shared[1].reads if self.shared else 0)
        tally.norm(hidden)
        tally.forward(hidden, "norm.out")
        tally.forward(most * self.gate_up.reads, "experts.input")
        tally.forward(most * self.gate_up.out, "experts.gate_up")
        if self.fills_beyond is not None and tokens > self.fills_beyond:
            tally.forward(most * self.gate_up.reads, "experts.output")
            tally.forward(most * max(self.gate_up.rank, self.down.rank), "experts.rank")
        tally.forward(hidden * self.chosen, "experts.rows")
        tally.forward(inner, "experts.hidden")
        tally.backward(inner, "experts.activated", "experts.scaled", "experts.grad_hidden")
        tally.backward(hidden, "experts.grad_normed")
        weight = self.count * self.gate_up.reads
        if self.router_itemsize != how.itemsize:
            tally.forward(weight, "experts.router")
        if self.trains_router:
            for itemsize in {how.itemsize, self.router_itemsize}:
                tally.backward(weight, "product", itemsize=itemsize)
        for stack in (self.gate_up, self.down):
            stack.passing(tokens, tally)
