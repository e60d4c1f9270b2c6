"""Keys and values of the sequences that a decoder holds, and the two ways in which new tokens join them: some
that follow each other in one slot, and one token in each of several slots.

Shapes: T new tokens, S slots, H query heads, G key-value heads, d head size, n tokens of a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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
        slots: how many.
        dtype: of keys and values.
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
        size = (shape.layers, slots, shape.keys, length, shape.size)
        # Zeros, as masked places must not hold NaN.
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))

    def reserve(self, length: int) -> None:
        """Make room for this many tokens a slot.

        Raises:
            ValueError: the model has too few positions.
        """
        held, most = self.keys.shape[3], self.shape.context_length
        if length <= held:
            return
        self._check(length)
        wanted = min(most, -(-max(length, 2 * held) // CACHE_STEP) * CACHE_STEP)
        self.keys, self.values = (F.pad(part, (0, 0, 0, wanted - held)) for part in (self.keys, self.values))

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

    def _check(self, length: int) -> None:
        if length > self.shape.context_length:
            raise ValueError(f"{length} tokens, but the model's context is {self.shape.context_length}")

    def _copy(self, source: int, target: int, length: int) -> None:
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]


def _common_beginning(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Joining(ABC):
    """How new tokens join the sequences they belong to; cos and sin of their positions are [T, 1, d / 2]."""

    def __init__(self, cache: AnswerCache, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.shape, self.cos, self.sin = cache.shape, cos, sin

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary positions (Su et al. 2021), the halves of a head as coordinates: [T, heads, d] -> the same."""
        first, second = heads.chunk(2, dim=2)
        cos, sin = self.cos, self.sin
        return torch.cat([(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)], 2)

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep keys and values [T, G, d] of a layer; queries, the last ones or all, [up to T, H, d] -> [.., H * d]."""


class Chunk(Joining):
    """Tokens that follow each other in one slot. Views are made once, as for one token products are small."""

    def __init__(self, cache: AnswerCache, rotary: tuple[torch.Tensor, torch.Tensor], slot: int, count: int) -> None:
        before, after = len(cache.ids[slot]), len(cache.ids[slot]) + count
        super().__init__(cache, *(part[before:after, None] for part in rotary))
        held = [part[:, slot : slot + 1, :, :after] for part in (cache.keys, cache.values)]
        self.keys, self.values = (part.unbind(0) for part in held)
        self.new_keys, self.new_values = (part[:, :, :, before:].unbind(0) for part in held)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [up to T, H, d]; k, v [T, G, d] -> [.., H * d]."""
        self.new_keys[layer].copy_(k.transpose(0, 1))
        self.new_values[layer].copy_(v.transpose(0, 1))
        keys, values, shape = self.keys[layer], self.values[layer], self.shape
        rows, after = len(q), keys.shape[2]
        if rows == 1:
            return _attend_rows(q, keys, values, None, shape)
        mask = None
        if after > rows:
            mask = torch.ones(rows, after, dtype=torch.bool, device=q.device).tril_(after - rows)
        k, v = (
            x.transpose(0, 1).expand(-1, shape.queries // shape.keys, -1, -1).flatten(0, 1)[None]
            for x in (keys, values)
        )
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=shape.scale
        )
        return out[0].transpose(0, 1).reshape(rows, -1)


class TokenEach(Joining):
    """A token in each of the first S slots, whose sequences differ in length."""

    def __init__(self, cache: AnswerCache, rotary: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
        lengths = [len(ids) for ids in cache.ids[:count]]
        places = torch.tensor(lengths, device=cache.device)
        super().__init__(cache, *(part[places, None] for part in rotary))
        self.cache, self.places, self.end = cache, places, max(lengths) + 1
        self.slots = torch.arange(count, device=cache.device)
        self.mask = (torch.arange(self.end, device=cache.device) <= places[:, None])[:, None, None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [S, H, d]; k, v [S, G, d] -> [S, H * d]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.places] = k
        values[self.slots, :, self.places] = v
        keys, values = keys[: len(q), :, : self.end], values[: len(q), :, : self.end]
        return _attend_rows(q, keys, values, self.mask, self.shape)


def _attend_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, shape: AnswerShape
) -> torch.Tensor:
    """One row of each sequence attends to all of it; heads that share keys are taken as rows of one.

    Args:
        q: [S, H, d].
        keys: [S, G, n, d]; likewise values.
        mask: bool [S, 1, 1, n], True where a row sees a key; None for everywhere.

    Returns:
        [S, H * d].
    """
    stacked = q.view(len(q), shape.keys, -1, shape.size)
    return F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=shape.scale).reshape(len(q), -1)
