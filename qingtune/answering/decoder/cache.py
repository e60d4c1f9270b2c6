"""Keys and values of the sequences that a decoder holds, and the three ways in which new tokens join them: a chunk of a
prompt in one slot, one token in the first slot, and one token in each of several slots.

Shapes: T new tokens, S slots, H query heads, G key-value heads, d head size, n tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

CACHE_STEP = 256  # tokens by which the cache grows at least


@dataclass(frozen=True)
class AnswerShape:
    """Of a model's attention: layers, heads of queries and of keys and values, their size, the factor on scores, and
    the longest sequence."""

    layers: int
    queries: int
    keys: int
    size: int
    scale: float
    context_length: int


class AnswerCache:
    """Sequences in slots, each with keys and values [G, capacity, d] of every layer.

    Args:
        shape: of the attention.
        slots: sequences.
        dtype: of keys and values.
        device: where they are.
        length: tokens of a slot for which there is room from the start; more is taken as sequences grow.

    Attributes:
        ids: of each slot's sequence, as far as keys and values are there.
        keys: [layers, slots, G, capacity, d]; likewise values.
    """

    def __init__(
        self, shape: AnswerShape, slots: int, dtype: torch.dtype, device: torch.device, length: int = 0
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self._check(length)
        self.keys, self.values = self._empty(length), self._empty(length)

    def reserve(self, length: int) -> None:
        """Make room for so many tokens a slot.

        Raises:
            ValueError: the model has no positions for so many.
        """
        held, most = self.keys.shape[3], self.shape.context_length
        if length <= held:
            return
        self._check(length)
        wanted = min(most, -(-max(length, 2 * held) // CACHE_STEP) * CACHE_STEP)
        self.keys, self.values = self._grown(self.keys, wanted), self._grown(self.values, wanted)

    def keep_common(self, ids: Sequence[int], slot: int) -> int:
        """How many of the ids a slot holds, after taking over what another one holds of them; the last one never."""
        common = [_common_beginning(held, ids) for held in self.ids]
        best = max(range(len(common)), key=common.__getitem__)
        kept = min(common[best], len(ids) - 1)
        if kept > common[slot]:
            self._copy(best, slot, kept)
        self.ids[slot] = list(ids[:kept])
        return kept

    def move(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        self._copy(source, target, len(self.ids[source]))
        self.ids[target] = list(self.ids[source])

    def slot_bytes(self, length: int) -> int:
        """What keys and values of so many tokens take."""
        shape = self.shape
        return 2 * shape.layers * shape.keys * shape.size * length * self.dtype.itemsize

    def _check(self, length: int) -> None:
        if length > self.shape.context_length:
            raise ValueError(f"{length} tokens, but the model's context is {self.shape.context_length}")

    def _empty(self, capacity: int) -> torch.Tensor:
        shape = self.shape
        size = (shape.layers, len(self.ids), shape.keys, capacity, shape.size)
        return torch.zeros(size, dtype=self.dtype, device=self.device)  # masked places must not hold NaN

    def _grown(self, held: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = self._empty(capacity)
        grown[:, :, :, : held.shape[3]] = held
        return grown

    def _copy(self, source: int, target: int, length: int) -> None:
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]


def _common_beginning(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Joining(Protocol):
    """How new tokens join the sequences they belong to."""

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary positions (Su et al. 2021), the halves of a head as coordinates: [T, heads, d] -> the same."""
        ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep keys and values [T, G, d] of a layer; queries, the last ones or all, [up to T, H, d] -> [.., H * d]."""
        ...


class Chunk:
    """Tokens that follow each other in one slot, which holds `before` tokens."""

    def __init__(self, cache: AnswerCache, rotary: tuple[torch.Tensor, torch.Tensor], slot: int, count: int) -> None:
        self.cache, self.slot, self.before = cache, slot, len(cache.ids[slot])
        self.after = self.before + count
        self.cos, self.sin = (part[self.before : self.after, None] for part in rotary)

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """[T, heads, d] -> the same."""
        return _turned(heads, self.cos, self.sin)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [up to T, H, d]; k, v [T, G, d] -> [.., H * d]."""
        shape = self.cache.shape
        keys, values = (held[layer, self.slot, :, : self.after] for held in (self.cache.keys, self.cache.values))
        keys[:, self.before :].copy_(k.transpose(0, 1))
        values[:, self.before :].copy_(v.transpose(0, 1))
        rows = len(q)
        if rows == 1:
            return _attend_rows(q, keys[None], values[None], None, shape)
        mask = None
        if self.after > rows:
            mask = torch.ones(rows, self.after, dtype=torch.bool, device=q.device).tril_(self.after - rows)
        k, v = (x[:, None].expand(-1, shape.queries // shape.keys, -1, -1).flatten(0, 1)[None] for x in (keys, values))
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=shape.scale
        )
        return out[0].transpose(0, 1).reshape(rows, -1)


class OneToken:
    """A token of the first slot: with as little overhead as possible, because the products are small."""

    def __init__(self, cache: AnswerCache, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        place = len(cache.ids[0])
        self.shape = cache.shape
        self.cos, self.sin = (part[place, None, None] for part in rotary)
        self.keys, self.values = (held[:, :1, :, : place + 1].unbind(0) for held in (cache.keys, cache.values))
        self.new_keys, self.new_values = (held[:, :1, :, place].unbind(0) for held in (cache.keys, cache.values))

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """[1, heads, d] -> the same."""
        return _turned(heads, self.cos, self.sin)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, H, d]; k, v [1, G, d] -> [1, H * d]."""
        self.new_keys[layer].copy_(k)
        self.new_values[layer].copy_(v)
        return _attend_rows(q, self.keys[layer], self.values[layer], None, self.shape)


class TokenEach:
    """A token in each of the first S slots, whose sequences differ in length."""

    def __init__(self, cache: AnswerCache, rotary: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
        self.cache, self.count = cache, count
        places = [len(ids) for ids in cache.ids[:count]]
        self.end = max(places) + 1
        self.places = torch.tensor(places, device=cache.device)
        self.slots = torch.arange(count, device=cache.device)
        self.mask = (torch.arange(self.end, device=cache.device) <= self.places[:, None])[:, None, None]
        self.cos, self.sin = (part[self.places, None] for part in rotary)

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """[S, heads, d] -> the same."""
        return _turned(heads, self.cos, self.sin)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [S, H, d]; k, v [S, G, d] -> [S, H * d]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.places] = k
        values[self.slots, :, self.places] = v
        keys, values = keys[: self.count, :, : self.end], values[: self.count, :, : self.end]
        return _attend_rows(q, keys, values, self.mask, self.cache.shape)


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, d]; cos and sin [T, 1, d / 2]."""
    first, second = heads.chunk(2, dim=2)
    return torch.cat([(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)], 2)


def _attend_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, shape: AnswerShape
) -> torch.Tensor:
    """One row of each sequence attends to all of it; heads that share keys are taken as rows of one.

    Args:
        q: [S, H, d].
        keys: [S, G, n, d]; likewise values.
        mask: bool [S, 1, 1, n], True where a row sees a key; None for everywhere.
        shape: of the attention.

    Returns:
        [S, H * d].
    """
    stacked = q.view(len(q), shape.keys, -1, shape.size)
    return F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=shape.scale).reshape(len(q), -1)
