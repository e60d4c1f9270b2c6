"""Bytes that training takes, as plain arithmetic over sizes: no torch, nothing read, nothing measured here.

The engine takes its own estimates from the same functions. What the fast kernels hold is counted in buffers.py.

Symbols: T tokens of a pass, N of them whose next token is trained, b bytes a number of the dtype that is computed in,
w = max(4, b) bytes of the one that sums are held in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

# Logits held at a time where the head is trained, or on a GPU: 84 MB in bf16, 276 rows of Qwen's vocabulary.
CHUNK_ELEMENTS = 2**25 + 2**23
# Otherwise rows of the head taken at a time, which stay in the cache, and rows of hidden states.
HEAD_TILE, HEAD_ROWS = 4096, 4096
ROWS_AT_A_TIME = 8  # rows of which the softmax is taken in fp32 at a time on a CPU, so that they stay in its cache
VOCABULARY_TILE = 2048  # rows of a head that is trained, where some of it has another dtype, taken at a time
QUERY_BLOCK = 256  # rows of a block of attention scores, at most
# Passes, and rows that the head takes, are filled up to it: products of 577 or 583 rows were seen to take 5 to 12 %
# longer than of 584, of 435 rows 4 % longer than of 436.
ROWS_MULTIPLE = 8
MOST_RANK_BYTES = 12_288  # of a row of A x that adapters' products in C take
INT8_TILE = 128  # rows quantised at a time, so that their fp32 copy stays in the cache
# Matrix products on a CPU are nearly as fast at 700 tokens as at more; activations grow with each one.
TOKENS_PER_PASS_ON_CPU = 768
# Share of the free memory that the buffers of a pass may take; the rest is for what a step needs for a moment.
BUFFERS_OF_FREE = 0.9
EIGHT_BITS = frozenset({"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"})
# Moments in 8 bits, with the largest value of each block of 256 in fp32.
BYTES_A_8BIT_STATE = 2 + 2 * 4 / 256


@dataclass(frozen=True)
class GeneralSizes:
    """A decoder with layers that are all alike; sizes in numbers.

    Attributes:
        inner: of the MLP.
        queries: all query heads together; likewise keys.
    """

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int


@dataclass(frozen=True)
class PassTokens:
    """The fullest pass: T tokens, N of them predicting trained ones, in samples of at most `longest` tokens."""

    tokens: int
    predicting: int
    longest: int


def low_rank_room(deep: int, wide: int, itemsize: int) -> int:
    """fp32 numbers that a product in C lays out an adapter's matrix in: K of so many bytes by N in whole panels."""
    return deep * itemsize // 4 * (-(-wide // 32) * 32)


def filled_up(rows: int) -> int:
    """Rows as products take them."""
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def head_tile(vocabulary: int, rows: int, *, large: bool) -> int:
    """Rows of the head taken at a time, where it is not trained; large: for as few calls as logits allow."""
    return min(vocabulary, max(HEAD_TILE, CHUNK_ELEMENTS // max(rows, 1)) if large else HEAD_TILE)


def logit_numbers(vocabulary: int, predicting: int, *, trains_head: bool, large: bool) -> int:
    """Logits held at a time, of N rows that predict: a tile of the head's, or rows of V where it is trained, in as few
    even chunks as there may be."""
    if not trains_head:
        rows = filled_up(min(predicting, HEAD_ROWS))
        return rows * head_tile(vocabulary, rows, large=large)
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


def autograd_bytes(sizes: GeneralSizes, tokens: int, itemsize: int, adapters: int, width: int, recompute: int) -> int:
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
