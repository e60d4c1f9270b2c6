"""Keys and values of the sequences that a decoder holds.

Shapes: G key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import Architecture, Attention

CACHE_STEP = 256  # tokens by which the cache grows at least


@dataclass(frozen=True)
class AnswerShape:
    """Of what a model keeps: layers with attention, heads of queries and of keys and values, their size, the factor on
    scores, and the longest sequence."""

    layers: int
    queries: int
    keys: int
    size: int
    scale: float
    context_length: int

    @classmethod
    def of(cls, architecture: Architecture) -> AnswerShape:
        """Of a model whose layers with attention have the same heads."""
        mixers = [layer.mixer for layer in architecture.layers if isinstance(layer.mixer, Attention)]
        one = mixers[0]
        return cls(len(mixers), one.queries, one.keys, one.size, one.scale, architecture.context)


class AnswerCache:
    """Sequences in slots, each with keys and values [G, capacity, d] of every layer.

    Args:
        slots: how many.
        dtype: of keys and values.
        length: tokens of a slot for which there is room from the start; more is taken as sequences grow.
        stretched_from: a sequence longer than this has other rotary positions, from its first token on; None if none.

    Attributes:
        ids: of each slot's sequence, as far as keys and values are there.
        stretched: whether the slot's keys have the positions of a long sequence.
        keys: [layers, slots, G, capacity, d]; likewise values.
    """

    def __init__(
        self,
        shape: AnswerShape,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        length: int = 0,
        stretched_from: int | None = None,
    ) -> None:
        self.shape, self.dtype, self.device, self.stretched_from = shape, dtype, device, stretched_from
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self.stretched = [False] * slots
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
        stretched = self.is_stretched(len(ids))
        common = [
            _common_beginning(held, ids) if kind == stretched else 0
            for held, kind in zip(self.ids, self.stretched, strict=True)
        ]
        best = max(range(len(common)), key=common.__getitem__)
        kept = min(common[best], len(ids) - 1)
        if kept > common[slot]:
            self._copy(best, slot, kept)
        self.ids[slot], self.stretched[slot] = list(ids[:kept]), stretched
        return kept

    def move(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        self._copy(source, target, len(self.ids[source]))
        self.ids[target], self.stretched[target] = list(self.ids[source]), self.stretched[source]

    def is_stretched(self, length: int) -> bool:
        """Whether a sequence of this many tokens has the positions of a long one."""
        return self.stretched_from is not None and length > self.stretched_from

    def _check(self, length: int) -> None:
        if length > self.shape.context_length:
            raise ValueError(f"{length} tokens, but the model's context is {self.shape.context_length}")

    def _copy(self, source: int, target: int, length: int) -> None:
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]


def _common_beginning(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
