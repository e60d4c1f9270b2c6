"""Sizes of the buffers that a mixture of experts takes, as buffers.py has those of other blocks: no torch.

How many tokens an expert gets is known in a pass only, so its buffers are for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.kernels.buffers import GroupSizes, Rows, Tally, Use, product_buffers


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

    def passing(self, rows: int, tally: Tally) -> None:
        """What products take in addition to inputs and outputs; rows: of an expert, at most."""
        how = tally.how
        product_buffers(GroupSizes(self.reads, (self.out,), (0,)), rows, tally)
        small = self.rank * max(self.reads, self.out)
        if how.itemsize != 4:  # adapters are fp32
            tally.forward(self.rank * self.reads, "experts.a")
            tally.forward(self.rank * self.out, "experts.b")
        tally.backward(rows * self.rank, "experts.grad_low")
        for itemsize in {how.itemsize, how.wide}:
            tally.backward(small, "product", itemsize=itemsize)
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
        shared: layers that read the shared expert's input, and the one that reads its hidden layer; None without it.
    """

    count: int
    chosen: int
    gate_up: StackSizes
    down: StackSizes
    router_itemsize: int
    trains_router: bool
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
        slot.forward(sent * self.gate_up.out, "gate_up")
        slot.forward(sent * self.gate_up.rank, "gate_up.low")
        slot.forward(sent * self.down.rank, "down.low")
        if self.shared:
            slot.forward(rows.asking * self.shared[1].reads, "shared_gate", "shared_up")
            slot.forward(rows.asking, "shared_share")

    def passing(self, rows: Rows, tally: Tally) -> None:
        """The norm, an expert's rows, and what each token gets from its experts."""
        how, tokens = tally.how, rows.asking
        hidden = tokens * self.gate_up.reads
        inner = tokens * max(self.down.reads, self.shared[1].reads if self.shared else 0)
        tally.norm(hidden)
        tally.forward(hidden, "norm.out", "experts.input")
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
