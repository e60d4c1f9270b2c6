"""Sizes of the buffers in which the fast kernels hold what they need (kernels/workspace.py), by their names: plain
arithmetic, no torch. A test holds each against the buffer that a pass really made.

Each block says what it takes (`BlockSizes`; block_sizes.py): what stays under its slot from forward to backward,
and what all blocks use in turn. Layers may differ from one another.

Symbols: T tokens of a pass, N of them whose next token is trained, b bytes a number of the dtype that is computed in,
w = max(4, b) bytes of the one that sums are held in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qingtune.kernels.footprint import (
    HEAD_ROWS,
    INT8_TILE,
    MOST_RANK_BYTES,
    ROWS_AT_A_TIME,
    VOCABULARY_TILE,
    PassTokens,
    filled_up,
    head_tile,
    logit_numbers,
    low_rank_room,
)

Buffers = dict[tuple[str, int], int]  # name and bytes a number -> bytes


@dataclass(frozen=True)
class Arithmetic:
    """How a run computes.

    Attributes:
        itemsize: b, bytes a number of activations.
        weight_itemsize: bytes a number of the linear layers' weights; None where they are quantised.
        head_itemsize: bytes a number of the head.
        trains_weights: whether the linear layers are trained themselves; likewise trains_head.
        reads_stored: whether weights of another dtype than activations' are multiplied without a copy of them.
        low_rank_in_c: whether adapters' products are those in C.
        attention_in_c: whether attention on a CPU is computed in C, which holds no scores.
        int8_units: whether int8 weights are multiplied as such.
        int8_room: rows and the numbers of each -> bytes of room for a product in C; None where PyTorch multiplies.
        dora: whether adapters have magnitudes.
        dropout: whether adapters' inputs are dropped.
        recompute: layers of which nothing but the input is kept.
        gradient_below: whether even the lowest layer's input gets a gradient.
        on_cpu: otherwise on a GPU, where attention holds its scores only if it caps them.
    """

    itemsize: int
    weight_itemsize: int | None
    head_itemsize: int
    trains_weights: bool = False
    trains_head: bool = False
    reads_stored: bool = False
    low_rank_in_c: bool = False
    attention_in_c: bool = False
    int8_units: bool = False
    int8_room: Callable[[int, int], int] | None = None
    dora: bool = False
    dropout: bool = False
    recompute: int = 0
    gradient_below: bool = False
    on_cpu: bool = True

    @property
    def wide(self) -> int:
        """w, bytes a number of what sums are held in."""
        return max(4, self.itemsize)

    def converts(self, weight_itemsize: int) -> bool:
        """Whether weights of this many bytes a number are brought to the dtype of activations for each product."""
        return weight_itemsize != self.itemsize and not self.reads_stored


class Tally:
    """The largest size asked for under each name.

    Args:
        how: gives the bytes a number where a call does not.
        trains: whether the pass has a backward.
    """

    def __init__(self, how: Arithmetic, *, trains: bool) -> None:
        self.how, self.trains, self.found = how, trains, Buffers()

    def forward(self, numbers: int, *names: str, itemsize: int | None = None) -> None:
        """Buffers of so many numbers each that every pass takes."""
        itemsize = itemsize or self.how.itemsize
        for name in names if numbers else ():
            key = name, itemsize
            self.found[key] = max(self.found.get(key, 0), numbers * itemsize)

    def backward(self, numbers: int, *names: str, itemsize: int | None = None) -> None:
        """Buffers that only passes with gradients take."""
        if self.trains:
            self.forward(numbers, *names, itemsize=itemsize)

    def norm(self, numbers: int) -> None:
        """What a norm of so many numbers takes but for its output."""
        self.forward(numbers, "norm.wide", itemsize=self.how.wide)
        self.backward(numbers, "norm.scaled", "norm.product", itemsize=self.how.wide)


@dataclass(frozen=True)
class Rows:
    """What a layer computes.

    Attributes:
        tokens: T, rows of its input.
        asking: rows that go beyond keys and values: N in the last layer, otherwise T.
        longest: tokens of the longest sample.
        last: whether it is the last layer, where rows that ask are gathered even if they are all.
        wanted: whether its input gets a gradient.
    """

    tokens: int
    asking: int
    longest: int
    last: bool
    wanted: bool


@dataclass(frozen=True)
class GroupSizes:
    """Linear layers that read one input (kernels/projection.py).

    Attributes:
        reads: in features.
        outs: out features of each layer.
        ranks: of each layer's adapter, 0 where there is none.
    """

    reads: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]

    def part(self, start: int, end: int | None = None) -> GroupSizes:
        """Some of its layers as a group of their own."""
        return GroupSizes(self.reads, self.outs[start:end], self.ranks[start:end])

    def fit_words(self, itemsize: int) -> bool:
        """Whether adapters' products in C take these sizes (native/low_rank.c), for numbers of so many bytes."""
        even = itemsize == 4 or not any(size % 2 for size in (self.reads, *self.outs, *self.ranks))
        return even and sum(self.ranks) * itemsize <= MOST_RANK_BYTES


# A group, the name under which it keeps its part of a slot, and the rows that it reads.
Use = tuple[GroupSizes, str, int]


class BlockSizes(Protocol):
    """What a block takes memory for."""

    def groups(self, rows: Rows) -> Sequence[Use]:
        """Its groups of linear layers, what these take being counted for it."""
        ...

    def kept(self, rows: Rows, slot: Tally) -> None:
        """What stays from its forward to its backward, by names within its slot."""
        ...

    def passing(self, rows: Rows, tally: Tally) -> None:
        """What it shares with other blocks, by the workspace's names."""
        ...


_Blocks = tuple[BlockSizes, BlockSizes]


@dataclass(frozen=True)
class ModelSizes:
    """A decoder.

    Attributes:
        layers: mixer and MLP of each.
        hidden: size of a token between layers.
        vocabulary: rows of the head.
        capped: whether its logits are.
    """

    layers: tuple[_Blocks, ...]
    hidden: int
    vocabulary: int
    capped: bool = False


def buffers(sizes: ModelSizes, how: Arithmetic, work: PassTokens, evaluation: PassTokens | None = None) -> Buffers:
    """What the workspace holds, in bytes, by its own names; what layers keep in slots of their own is "layer.kept", and
    their inputs are "layer.input".

    Args:
        work: the fullest training pass.
        evaluation: the fullest one without gradients, None where there is none.
    """
    found = _pass_buffers(sizes, how, work, trains=True)
    if evaluation is not None:
        for key, size in _pass_buffers(sizes, how, evaluation, trains=False).items():
            found[key] = max(found.get(key, 0), size)
    return found


def buffer_bytes(
    sizes: ModelSizes, how: Arithmetic, work: PassTokens, evaluation: PassTokens | None = None
) -> tuple[int, int]:
    """Bytes of all buffers: activations with what products need, and logits."""
    held = buffers(sizes, how, work, evaluation)
    logits = sum(size for (name, _), size in held.items() if name.startswith("head."))
    return sum(held.values()) - logits, logits


def _pass_buffers(sizes: ModelSizes, how: Arithmetic, work: PassTokens, *, trains: bool) -> Buffers:
    """Those of one pass; without gradients no layer keeps anything."""
    tally, count = Tally(how, trains=trains), len(sizes.layers)
    kept, shared = Counter[tuple[_Blocks, Rows]](), set[tuple[_Blocks, Rows]]()
    for number, blocks in enumerate(sizes.layers):
        last, wanted = number == count - 1, number > 0 or how.gradient_below
        rows = Rows(work.tokens, work.predicting if last else work.tokens, work.longest, last=last, wanted=wanted)
        if trains and number >= how.recompute:
            kept[blocks, rows] += 1
        else:
            shared.add((blocks, rows))
    of_layers = Buffers()
    for (blocks, rows), times in kept.items():
        for (_, itemsize), size in _slot(blocks, rows, sizes.hidden, how).items():
            key = "layer.kept", itemsize
            of_layers[key] = of_layers.get(key, 0) + times * size
    for blocks, rows in shared:  # all in one slot
        for (name, itemsize), size in _slot(blocks, rows, sizes.hidden, how).items():
            tally.forward(size // itemsize, f"layer.{name}", itemsize=itemsize)
    for blocks, rows in {*kept, *shared}:
        for block in blocks:
            block.passing(rows, tally)
            for group, _, read in block.groups(rows):
                product_buffers(group, read, tally)
    _head(sizes, work, tally)
    tokens, last = work.tokens * sizes.hidden, work.predicting * sizes.hidden
    if trains:
        tally.forward(count * tokens + last, "layer.input")
    else:
        tally.forward(tokens, "input0", *["input1"] * (count > 1))
    return tally.found | of_layers


def _slot(blocks: _Blocks, rows: Rows, hidden: int, how: Arithmetic) -> Buffers:
    """What stays from a layer's forward to its backward."""
    slot = Tally(how, trains=True)
    slot.forward(rows.asking * hidden, "middle")
    for block in blocks:
        block.kept(rows, slot)
        for group, name, read in block.groups(rows):
            slot.forward(read * sum(group.ranks), f"{name}.low")
            for number, (out, rank) in enumerate(zip(group.outs, group.ranks, strict=True)):
                if how.dora and rank:
                    slot.forward(out, f"{name}.norms{number}", itemsize=how.wide)
    return slot.found


def _head(sizes: ModelSizes, work: PassTokens, tally: Tally) -> None:
    """What the last norm and the head take."""
    how, hidden = tally.how, sizes.hidden
    tally.norm(work.predicting * hidden)
    tally.forward(work.predicting * hidden, "norm.out")
    tally.backward(work.predicting * hidden, "grad_hidden")
    converted, in_chunks = how.converts(how.head_itemsize), how.trains_head and tally.trains
    large = not how.on_cpu and not converted
    logits = logit_numbers(sizes.vocabulary, work.predicting, trains_head=in_chunks, large=large)
    rows = filled_up(min(work.predicting, HEAD_ROWS))
    tile = head_tile(sizes.vocabulary, rows, large=large)
    if in_chunks:
        rows, tile = logits // sizes.vocabulary, min(VOCABULARY_TILE, sizes.vocabulary)
    width = sizes.vocabulary if in_chunks else tile
    tally.forward(logits, "head.logits", *["head.slopes"] * sizes.capped)
    tally.forward((min(ROWS_AT_A_TIME, rows) if how.on_cpu else rows) * width, "head.rows", itemsize=how.wide)
    tally.forward(tile * hidden * converted, "weight")
    if not in_chunks:
        tally.forward(rows * hidden, "head.hidden")
        tally.backward(rows * hidden, "head.part")
        tally.backward(rows * hidden, "head.total", itemsize=how.wide)
        tally.backward(rows * hidden, "head.targets", itemsize=how.head_itemsize)
    elif converted:
        tally.forward(rows * tile, "product")
        for itemsize in {how.itemsize, how.wide}:
            tally.backward(rows * hidden, "product", itemsize=itemsize)
    if in_chunks and how.head_itemsize != how.itemsize:
        for itemsize in (how.itemsize, how.head_itemsize):
            tally.backward(tile * hidden, "product", itemsize=itemsize)


def product_buffers(group: GroupSizes, rows: int, tally: Tally) -> None:
    """What products with a group's weights and adapters take in addition to inputs and outputs."""
    how, reads, ranks = tally.how, group.reads, group.ranks
    out = max(group.outs)
    if not how.int8_units if how.weight_itemsize is None else how.converts(how.weight_itemsize):
        tally.forward(reads * out, "weight")
    if how.trains_weights and how.weight_itemsize not in (None, how.itemsize):
        for itemsize in (how.itemsize, how.weight_itemsize):
            tally.backward(reads * out, "product", itemsize=itemsize)
    if sum(ranks):
        _adapter_buffers(group, rows, tally)
    if how.int8_units:
        tally.forward(rows * reads, "projection.x.packed", itemsize=1)
        tally.backward(rows * out, "projection.grad.packed", itemsize=1)
        tally.forward(rows, "projection.x.scales", itemsize=4)
        tally.backward(rows, "projection.grad.scales", itemsize=4)
        tally.forward(min(INT8_TILE, rows) * reads, "int8.tile", itemsize=4)
        tally.backward(min(INT8_TILE, rows) * out, "int8.tile", itemsize=4)
        if how.int8_room:
            tally.forward(how.int8_room(rows, reads), "int8.room", itemsize=1)
            tally.backward(how.int8_room(rows, out), "int8.room", itemsize=1)
        else:
            tally.forward(rows * out, "int8.sums", "int8.wide", itemsize=4)
            tally.backward(rows * reads, "int8.sums", "int8.wide", itemsize=4)
    if how.dora and sum(ranks):
        if how.weight_itemsize != how.wide:
            tally.forward(reads * out, "weight", itemsize=how.wide)
        tally.forward(reads * out, "projection.merged", itemsize=how.wide)
        tally.forward(rows * out, "projection.direction")
        for number, (mine, rank) in enumerate(zip(group.outs, ranks, strict=True)):
            tally.backward(rows * mine * (rank > 0), f"projection.scaled{number}")


def _adapter_buffers(group: GroupSizes, rows: int, tally: Tally) -> None:
    """What products with a group's adapters take."""
    how, reads, outs, ranks = tally.how, group.reads, group.outs, group.ranks
    tally.backward(rows * sum(ranks), "projection.grad_low")
    if how.dropout:
        tally.backward(rows * reads, "projection.dropped")
    if how.low_rank_in_c and group.fit_words(how.itemsize):
        tally.forward(low_rank_room(reads, sum(ranks), how.itemsize), "projection.room", itemsize=4)
        for out, rank in zip(outs, ranks, strict=True):
            tally.backward(low_rank_room(out, rank, how.itemsize), "projection.room", itemsize=4)
        return
    small = max(out * rank for out, rank in zip(outs, ranks, strict=True))
    tally.forward(reads * sum(ranks), "projection.a")
    tally.forward(small, "projection.b")
    tally.backward(rows * max(ranks), "projection.grad_mine")
    if how.itemsize == how.wide:  # gradients of B are added where they belong, those of A are one product
        tally.backward(reads * sum(ranks), "product")
    else:
        tally.backward(max(small, reads * sum(ranks)), "product")
        tally.backward(max(small, reads * max(ranks)), "product", itemsize=how.wide)
