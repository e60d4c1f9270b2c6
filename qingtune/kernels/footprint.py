"""Bytes that training takes, as plain arithmetic over sizes: no torch, nothing read, nothing measured here.

The fast kernels keep what they need in named buffers (kernels/workspace.py), and `buffers` gives the size of each; a
test holds it against the buffers that a pass really made. The engine takes its own estimates from the same functions.

Symbols: T tokens of a pass, N of them whose next token is trained, b bytes a number of the dtype that is computed in,
w = max(4, b) bytes of the one that sums are held in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

CHUNK_ELEMENTS = 2**25 + 2**23  # logits held at a time: 84 MB in bf16, 276 rows of Qwen's vocabulary
ROWS_AT_A_TIME = 8  # rows of which the softmax is taken in fp32 at a time on a CPU, so that they stay in its cache
VOCABULARY_TILE = 2048  # rows of a head in another dtype, or one that is trained, taken at a time
QUERY_BLOCK = 256  # rows of a block of attention scores, at most
ROWS_MULTIPLE = 8  # passes are filled up to it: products of 577 or 583 rows were seen to take 5 to 12 % longer than 584
INT8_TILE = 128  # rows quantised at a time, so that their fp32 copy stays in the cache
# Matrix products on a CPU are nearly as fast at 700 tokens as at more; activations grow with each one.
TOKENS_PER_PASS_ON_CPU = 768
# Share of the free memory that the buffers of a pass may take; the rest is for what a step needs for a moment.
BUFFERS_OF_FREE = 0.9
EIGHT_BITS = frozenset({"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"})
# Moments in 8 bits, with the largest value of each block of 256 in fp32.
BYTES_A_8BIT_STATE = 2 + 2 * 4 / 256


@dataclass(frozen=True)
class Ranks:
    """Ranks of a layer's adapters, 0 where there is none; of different ones, the largest."""

    q: int = 0
    k: int = 0
    v: int = 0
    o: int = 0
    gate: int = 0
    up: int = 0
    down: int = 0

    @property
    def groups(self) -> tuple[int, int, int, int]:
        """Sums over the layers that read one input: query, key, value; output; gate, up; down."""
        return self.q + self.k + self.v, self.o, self.gate + self.up, self.down


@dataclass(frozen=True)
class LayerSizes:
    """A decoder with layers that are all alike; sizes in numbers.

    Attributes:
        inner: of the MLP.
        queries: all query heads together; likewise keys.
        heads: query heads.
        query_key_norm: whether queries and keys are normed.
        ranks: of one layer's adapters.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    query_key_norm: bool
    ranks: Ranks

    @property
    def largest_weight(self) -> int:
        """Of the linear layers but the head."""
        return max(self.hidden * self.inner, self.hidden * self.queries)


@dataclass(frozen=True)
class Arithmetic:
    """How a run computes.

    Attributes:
        itemsize: b, bytes a number of activations.
        weight_itemsize: bytes a number of the linear layers' weights; None where they are quantised.
        head_itemsize: bytes a number of the head.
        trains_weights: whether the linear layers are trained themselves; likewise trains_head.
        int8_units: whether int8 weights are multiplied as such.
        dora: whether adapters have magnitudes.
        dropout: whether adapters' inputs are dropped.
        recompute: layers of which nothing but the input is kept.
        gradient_below: whether even the lowest layer's input gets a gradient.
        on_cpu: otherwise on a GPU, where attention never holds its scores.
    """

    itemsize: int
    weight_itemsize: int | None
    head_itemsize: int
    trains_weights: bool = False
    trains_head: bool = False
    int8_units: bool = False
    dora: bool = False
    dropout: bool = False
    recompute: int = 0
    gradient_below: bool = False
    on_cpu: bool = True

    @property
    def wide(self) -> int:
        """w, bytes a number of what sums are held in."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class PassTokens:
    """The fullest pass: T tokens, N of them predicting trained ones, in samples of at most `longest` tokens."""

    tokens: int
    predicting: int
    longest: int


def logit_numbers(vocabulary: int, predicting: int) -> int:
    """Logits held at a time, of N rows that predict: rows of V, in as few even chunks as there may be."""
    chunks = max(1, -(-predicting * vocabulary // CHUNK_ELEMENTS))
    return -(-predicting // chunks) * vocabulary


def layers_to_recompute(choice: bool | str, layers: int, pass_bytes: Callable[[int], int], room: float | None) -> int:
    """How many layers, from the first, keep nothing but their input.

    Args:
        choice: the setting: true for all, false for none, "auto" for as few as the room allows, all where none fits.
        pass_bytes: layers that are recomputed -> bytes of a pass; fewer for more layers, from two on.
        room: bytes for the pass; None where unknown.
    """
    if choice != "auto":
        return layers if choice else 0
    if room is None or pass_bytes(0) <= room:
        return 0
    # Recomputed layers share one layer's buffers, so that a single one saves nothing.
    return bisect_left(range(layers), True, 2, key=lambda count: pass_bytes(count) <= room)


def optimizer_bytes(optim: str, numbers: int) -> int:
    """What the optimizer keeps for this many trained numbers: AdamW's two moments in fp32 or 8 bits."""
    return round(numbers * (0 if optim == "sgd" else BYTES_A_8BIT_STATE if optim in EIGHT_BITS else 8))


# --- Buffers of the fast kernels -------------------------------------------------------------------------------------

_AtLeast = Callable[..., None]  # numbers, the names of buffers that hold so many, and bytes a number unless they are b
Buffers = dict[tuple[str, int], int]  # name and bytes a number -> bytes; layers' own ones are one entry


def buffers(sizes: LayerSizes, how: Arithmetic, work: PassTokens, evaluation: PassTokens | None = None) -> Buffers:
    """What the workspace holds, in bytes, by its own names.

    work: the fullest training pass; evaluation: the fullest one without gradients, None where there is none.
    """
    found = _training_buffers(sizes, how, work, evaluates=evaluation is not None)
    if evaluation is not None:
        alone = _training_buffers(sizes, replace(how, recompute=sizes.layers), evaluation, evaluates=True)
        for key, size in alone.items():
            if key[0] in _FORWARD:
                found[key] = max(found.get(key, 0), size)
        found["input", how.itemsize] = 2 * evaluation.tokens * sizes.hidden * how.itemsize
        if how.head_itemsize != how.itemsize:  # otherwise only a head that gets a gradient is taken in tiles
            rows = logit_numbers(sizes.vocabulary, evaluation.predicting) // sizes.vocabulary
            product = rows * min(VOCABULARY_TILE, sizes.vocabulary) * how.itemsize
            found["product", how.itemsize] = max(found["product", how.itemsize], product)
    return found


# Buffers that passes without gradients use, too, in addition to their two for inputs.
_FORWARD = frozenset({
    "layer.shared", "norm.out", "norm.wide", "norm.q", "norm.k", "attention.raw_q", "attention.raw_k",
    "attention.raw_v", "attention.rotated_q", "attention.rotated_k", "attention.attended", "attention.scores",
    "attention.shares", "mlp.hidden", "head.logits", "head.rows", "weight", "projection.a", "projection.b",
    "projection.x.packed", "projection.x.scales", "int8.tile", "int8.sums", "int8.wide", "projection.direction",
    "projection.merged",
})  # fmt: skip


def _training_buffers(sizes: LayerSizes, how: Arithmetic, work: PassTokens, *, evaluates: bool) -> Buffers:
    """Those of training passes; `evaluates` adds what other passes leave in layers that keep nothing."""
    found: Buffers = {}

    def at_least(numbers: int, *names: str, itemsize: int = how.itemsize) -> None:
        for name in names:
            found[name, itemsize] = max(found.get((name, itemsize), 0), numbers * itemsize)

    _kept(sizes, how, work, at_least, evaluates=evaluates)
    _norms_and_attention(sizes, how, work, at_least)
    _mlp_and_head(sizes, how, work, at_least)
    _products(sizes, how, work, at_least)
    return {key: size for key, size in found.items() if size}


def buffer_bytes(
    sizes: LayerSizes, how: Arithmetic, work: PassTokens, evaluation: PassTokens | None = None
) -> tuple[int, int]:
    """Bytes of all buffers: activations with what products need, and logits."""
    held = buffers(sizes, how, work, evaluation)
    logits = sum(size for (name, _), size in held.items() if name.startswith("head."))
    return sum(held.values()) - logits, logits


def _kept(sizes: LayerSizes, how: Arithmetic, work: PassTokens, at_least: _AtLeast, *, evaluates: bool) -> None:
    """What stays from a layer's forward to its backward; the last layer continues with predicting rows only."""
    tokens, last, ranks = work.tokens, work.predicting, sizes.ranks
    qkv, o, gate_up, down = ranks.groups

    def slot(rows: int) -> int:
        """Rows of a layer beyond keys and values; keys and values of all tokens."""
        numbers = rows * (2 * sizes.queries + sizes.hidden + 2 * sizes.inner + o + gate_up + down)
        numbers += tokens * 2 * sizes.keys
        return numbers + sizes.query_key_norm * (rows * sizes.queries + tokens * sizes.keys)

    last_low = tokens * (ranks.k + ranks.v) + last * ranks.q
    keeping = sizes.layers - how.recompute
    if keeping:
        at_least((keeping - 1) * (slot(tokens) + tokens * qkv) + slot(last) + last_low, "layer.kept")
    if how.recompute:  # layers of which nothing is kept share one slot
        # Passes without gradients leave in it what the last layer keeps apart.
        at_least(slot(tokens) + tokens * qkv + last_low * (evaluates or not keeping), "layer.shared")
    if how.dora:
        read_by_attention = sizes.queries + 2 * sizes.keys
        norms = read_by_attention + 2 * sizes.hidden + 2 * sizes.inner
        sharing = bool(how.recompute or evaluates)
        last_shares = sharing and (evaluates or not keeping)
        at_least((keeping + sharing) * norms + last_shares * read_by_attention, "layer.norms", itemsize=how.wide)
    at_least(sizes.layers * tokens * sizes.hidden + last * sizes.hidden, "layer.input")


def _norms_and_attention(sizes: LayerSizes, how: Arithmetic, work: PassTokens, at_least: _AtLeast) -> None:
    tokens, last, wide = work.tokens, work.predicting, how.wide
    queries, keys, hidden = sizes.queries, sizes.keys, sizes.hidden
    widest = max(hidden, queries) if sizes.query_key_norm else hidden
    at_least(tokens * widest, "norm.wide", "norm.scaled", "norm.product", itemsize=wide)
    at_least(tokens * hidden, "norm.out")
    q, k = ("norm.q", "norm.k") if sizes.query_key_norm else ("attention.raw_q", "attention.raw_k")
    at_least(tokens * queries, q, "attention.rotated_q", "attention.grad_q", "attention.grad_out")
    at_least(tokens * keys, k, "attention.raw_v", "attention.rotated_k")
    at_least(tokens * keys, "attention.grad.k", "attention.grad.v", itemsize=wide)
    if sizes.layers > 1 or how.gradient_below:
        at_least(tokens * hidden, "attention.grad_normed", "attention.grad_x")
        at_least(last * hidden, "attention.grad_rows")
    if how.on_cpu:
        rows = -(-work.longest // max(1, -(-work.longest // QUERY_BLOCK)))
        at_least(rows * queries, "attention.attended")
        at_least(sizes.heads * rows * work.longest, "attention.scores", "attention.shares", "attention.grad_scores")


def _mlp_and_head(sizes: LayerSizes, how: Arithmetic, work: PassTokens, at_least: _AtLeast) -> None:
    tokens, wide = work.tokens, how.wide
    at_least(tokens * sizes.inner, "mlp.hidden", "mlp.activated", "mlp.grad_hidden")
    at_least(tokens * sizes.hidden, "mlp.grad_normed")
    at_least(work.predicting * sizes.hidden, "grad_hidden")
    logits = logit_numbers(sizes.vocabulary, work.predicting)
    at_least(logits, "head.logits")
    rows = logits // sizes.vocabulary
    in_fp32 = min(ROWS_AT_A_TIME, rows) if how.on_cpu else rows
    at_least(in_fp32 * sizes.vocabulary, "head.rows", itemsize=wide)
    if how.trains_head or how.head_itemsize != how.itemsize:  # taken a tile of rows at a time
        tile = min(VOCABULARY_TILE, sizes.vocabulary)
        if how.head_itemsize != how.itemsize:
            at_least(tile * sizes.hidden, "weight")
        at_least(max(rows * tile, rows * sizes.hidden, tile * sizes.hidden * how.trains_head), "product")
        if wide != how.itemsize:
            at_least(rows * sizes.hidden, "product", itemsize=wide)
        if how.trains_head and how.head_itemsize != how.itemsize:
            at_least(tile * sizes.hidden, "product", itemsize=wide)


def _products(sizes: LayerSizes, how: Arithmetic, work: PassTokens, at_least: _AtLeast) -> None:
    """What products with weights and adapters need in addition to inputs and outputs."""
    tokens, wide = work.tokens, how.wide
    widths = (sizes.hidden, sizes.queries, sizes.hidden, sizes.inner)  # of what each group of layers reads
    outs = (max(sizes.queries, sizes.keys), sizes.hidden, sizes.inner, sizes.hidden)
    ranks, groups = sizes.ranks, sizes.ranks.groups
    most = (max(ranks.q, ranks.k, ranks.v), ranks.o, max(ranks.gate, ranks.up), ranks.down)
    unpacks = not how.int8_units if how.weight_itemsize is None else how.weight_itemsize != how.itemsize
    if unpacks:  # weights are brought to the dtype of activations for each product
        at_least(sizes.largest_weight, "weight")
    if how.trains_weights:
        at_least(sizes.largest_weight, "product")
        if how.weight_itemsize not in (None, how.itemsize):
            at_least(sizes.largest_weight, "product", itemsize=wide)
    if sum(groups):
        small = [sizes.queries * ranks.q, sizes.keys * max(ranks.k, ranks.v)]
        small += [out * rank for out, rank in zip(outs[1:], most[1:], strict=True)]
        stacked = [width * group for width, group in zip(widths, groups, strict=True)]
        at_least(max(stacked), "projection.a")
        at_least(max(small), "projection.b")
        at_least(tokens * max(groups), "projection.grad_low")
        at_least(tokens * max(most), "projection.grad_mine")
        for itemsize in {how.itemsize, wide}:
            at_least(max(*small, *stacked), "product", itemsize=itemsize)
    if how.dropout:
        at_least(tokens * max(widths), "projection.dropped")
    if how.int8_units:
        at_least(tokens * max(widths), "projection.x.packed", itemsize=1)
        at_least(tokens * max(outs), "projection.grad.packed", itemsize=1)
        at_least(tokens, "projection.x.scales", "projection.grad.scales", itemsize=4)
        at_least(min(INT8_TILE, tokens) * max(*widths, *outs), "int8.tile", itemsize=4)
        at_least(tokens * max(*widths, *outs), "int8.sums", "int8.wide", itemsize=4)
    if how.dora:
        if how.weight_itemsize != wide:
            at_least(sizes.largest_weight, "weight", itemsize=wide)
        at_least(sizes.largest_weight, "projection.merged", itemsize=wide)
        at_least(tokens * max(outs), "projection.direction")
        scaled = (max(sizes.queries, sizes.hidden, sizes.inner), max(sizes.keys, sizes.inner), sizes.keys)
        for number, width in enumerate(scaled):
            at_least(tokens * width, f"projection.scaled{number}")


# --- The model's own modules -----------------------------------------------------------------------------------------


def autograd_bytes(sizes: LayerSizes, tokens: int, itemsize: int, adapters: int, width: int, recompute: int) -> int:
    """About what autograd keeps of a pass through Transformers' modules, logits not counted.

    A layer keeps of each token: two norms' inputs in fp32 and outputs, queries, keys and values, what attention gives
    twice, and of the MLP gate, its activation, up and their product; adapters are cast to b again. Of layers that are
    computed again only the input stays, and one of them is there in full at a time.

    Args:
        tokens: of a pass, or of its longest sample if they go one by one.
        adapters: numbers of all adapters.
        width: sum of the ranks of a layer's adapters.
        recompute: layers that are computed again.
    """
    wide = max(4, itemsize)
    a_layer = 2 * sizes.hidden * (wide + itemsize) + itemsize * (3 * sizes.queries + 2 * sizes.keys + 4 * sizes.inner)
    a_layer += itemsize * width
    inputs = sizes.hidden * itemsize
    kept = (sizes.layers - recompute) * a_layer + recompute * inputs + (recompute > 0) * a_layer
    moment = 2 * itemsize * sizes.inner + wide * sizes.hidden  # gradients that pass through at any time
    return tokens * (kept + moment) + adapters * itemsize


def autograd_logit_bytes(vocabulary: int, predicting: int, itemsize: int) -> int:
    """About what the logits of a sample's predicting rows take: log-softmax in fp32, and gradients in both formats."""
    wide = max(4, itemsize)
    return vocabulary * predicting * (2 * wide + 2 * itemsize)
