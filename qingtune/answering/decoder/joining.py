"""The two ways in which new tokens join the sequences of a cache: some that follow each other in one slot, and one
token in each of several slots.

Shapes: T new tokens, S slots, H query heads, G key-value heads, d head size, n tokens of a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from qingtune.answering.decoder.cache import AnswerCache
from qingtune.answering.decoder.rotary import Rotary, Table
from qingtune.kernels.architecture import Attention
from qingtune.kernels.delta.answer import DeltaCore


class Joining(ABC):
    """How new tokens join the sequences they belong to.

    Args:
        tables: cos and sin of the new tokens' positions, each [T, 1, rotary size / 2], by name.
        factor: of queries; None for 1.
    """

    def __init__(self, tables: Mapping[str, Table], factor: torch.Tensor | None) -> None:
        self._tables, self._factor = tables, factor

    def turn(self, heads: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Give queries and keys their positions: [T, H + G, d] -> the same."""
        cos, sin = self._tables[attention.rotary]
        size = cos.shape[2]
        first, second = heads[..., :size], heads[..., size : 2 * size]
        turned = [(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)]
        if 2 * size < heads.shape[2]:
            turned.append(heads[..., 2 * size :])
        heads = torch.cat(turned, 2)
        if self._factor is not None:
            heads[:, : attention.queries] *= self._factor.to(heads.dtype)
        return heads

    @abstractmethod
    def attend(
        self, number: int, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Keep keys and values [T, G, d] of a layer; queries, the last ones or all, [up to T, H, d] -> [.., H * d].

        number: of the layer, among those with attention.
        """

    @abstractmethod
    def recur(
        self, number: int, core: DeltaCore, qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        """What a gated delta net's output layer reads, [T, H e], and its states after the new tokens.

        number: of the layer, among delta nets; the others as `DeltaCore.chunk` takes them.
        """


class Chunk(Joining):
    """Tokens that follow each other in one slot. Views are made once, as for one token products are small."""

    def __init__(self, cache: AnswerCache, rotary: Rotary, slot: int, count: int) -> None:
        before, after = len(cache.ids[slot]), len(cache.ids[slot]) + count
        tables = rotary.stretched if rotary.stretched and cache.stretched[slot] else rotary.tables
        super().__init__(
            {name: (cos[before:after, None], sin[before:after, None]) for name, (cos, sin) in tables.items()},
            rotary.query_factor(torch.arange(before, after, device=cache.device)) if rotary.query_scaling else None,
        )
        held = [part[:, slot : slot + 1, :, :after] for part in (cache.keys, cache.values)]
        self._keys, self._values = (part.unbind(0) for part in held)
        self._new_keys, self._new_values = (part[:, :, :, before:].unbind(0) for part in held)
        self._states = [part[:, slot : slot + 1] for part in (cache.rows, cache.states)]
        cache.whole[slot] = False  # until all layers are through

    def attend(
        self, number: int, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [up to T, H, d]; k, v [T, G, d] -> [.., H * d]."""
        self._new_keys[number].copy_(k.transpose(0, 1))
        self._new_values[number].copy_(v.transpose(0, 1))
        keys, values, rows = self._keys[number], self._values[number], len(q)
        after = keys.shape[2]
        if attention.window is not None and after >= attention.window + rows:  # what none of the rows sees
            first = after - rows - attention.window + 1
            keys, values = keys[:, :, first:], values[:, :, first:]
        if rows == 1:
            return _attend_rows(q, keys, values, None, attention)
        k, v = (
            x.transpose(0, 1).expand(-1, attention.queries // attention.keys, -1, -1).flatten(0, 1)[None]
            for x in (keys, values)
        )
        mask = _mask(rows, keys.shape[2], attention.window, q.device)
        out = _attend(q.transpose(0, 1)[None], k, v, mask, attention, causal=mask is None)
        return out[0].transpose(0, 1).reshape(rows, -1)

    def recur(
        self, number: int, core: DeltaCore, qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        """[T, H e]."""
        rows, states = (part[number] for part in self._states)
        if len(qkv) == 1:
            return core.step(qkv, z, b, a, rows, states)
        return core.chunk(qkv, z, b, a, rows[0], states[0])


def _mask(rows: int, seen: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of the tokens seen each of the last rows sees, bool [rows, seen]; None where that is causality alone."""
    window = seen if window is None else min(window, seen)
    if seen == rows == window:
        return None
    mask = torch.ones(rows, seen, dtype=torch.bool, device=device).tril_(seen - rows)
    return mask.triu_(seen - rows - window + 1)


class TokenEach(Joining):
    """A token in each of the first S slots, whose sequences differ in length."""

    def __init__(self, cache: AnswerCache, rotary: Rotary, count: int) -> None:
        lengths = [len(ids) for ids in cache.ids[:count]]
        places = torch.tensor(lengths, device=cache.device)
        super().__init__(rotary.at(lengths, cache.stretched[:count]), rotary.query_factor(places))
        self._cache, self._places, self._end, self._least = cache, places, max(lengths) + 1, min(lengths)
        self._slots = torch.arange(count, device=cache.device)
        self._masks: dict[int | None, torch.Tensor] = {}
        cache.whole[:count] = [False] * count  # until all layers are through

    def attend(
        self, number: int, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [S, H, d]; k, v [S, G, d] -> [S, H * d]."""
        keys, values = self._cache.keys[number], self._cache.values[number]
        keys[self._slots, :, self._places] = k
        values[self._slots, :, self._places] = v
        window = attention.window
        first = 0 if window is None else max(0, self._least + 1 - window)
        keys, values = keys[: len(q), :, first : self._end], values[: len(q), :, first : self._end]
        if window not in self._masks:
            ids = torch.arange(first, self._end, device=q.device)
            seen = ids <= self._places[:, None]
            if window is not None:
                seen &= ids > self._places[:, None] - window
            self._masks[window] = seen[:, None, None]
        return _attend_rows(q, keys, values, self._masks[window], attention)

    def recur(
        self, number: int, core: DeltaCore, qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor
    ) -> torch.Tensor:
        """[S, H e]."""
        rows, states = (part[number, : len(qkv)] for part in (self._cache.rows, self._cache.states))
        return core.step(qkv, z, b, a, rows, states)


def _attend_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, attention: Attention
) -> torch.Tensor:
    """One row of each sequence attends to all of it; heads that share keys are taken as rows of one.

    Args:
        q: [S, H, d].
        keys: [S, G, n, d]; likewise values.
        mask: bool [S, 1, 1, n], True where a row sees a key; None for everywhere.

    Returns:
        [S, H * d].
    """
    stacked = q.view(len(q), attention.keys, -1, attention.size)
    out = _attend(stacked, keys, values, mask, attention)
    return out.reshape(len(q), -1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    attention: Attention,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Rows of heads, q [S, heads, rows, d], k and v [S, heads, n, d] -> [S, heads, rows, d].

    PyTorch's fused attention, which does not cap scores: with a cap they are all held.

    Args:
        mask: bool, True where a row sees a key; None for everywhere, with causal up to its own place.
    """
    if attention.cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=attention.scale)
    scores = (q @ k.transpose(2, 3)).mul_(attention.scale / attention.cap).tanh_().mul_(attention.cap)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_()
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(3) @ v
