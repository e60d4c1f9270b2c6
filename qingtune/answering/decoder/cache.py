"""What a decoder keeps of the sequences it holds: keys and values of every token, and of gated delta nets two states.

Keys and values of a sequence's beginning are what they would be for that beginning alone, so any number of tokens can
be reused. States go over all tokens that a slot holds, and cannot go back: some are kept as they were after fewer.

Shapes: G key-value heads, d head size; of delta nets M channels, w tokens that the convolution sees, H value heads, d
and e the sizes of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import Architecture, Attention, DeltaNet

CACHE_STEP = 256  # tokens by which the cache grows at least
# A prompt's states are kept as they were before its last tokens: those differ in a chat's next turn, where a template
# leaves out what begins an answer. And where a prompt leaves a sequence that is held, as more may begin like both.
LAST_TOKENS = 16
KEPT_STATES = 2  # of a slot: after the fewest tokens, as of a system prompt, and after the most

States = tuple[torch.Tensor, torch.Tensor]  # of all delta nets: [layers, w - 1, M] and [layers, H, d, e], fp32


@dataclass(frozen=True)
class AnswerShape:
    """Of what a model keeps: layers with attention, heads of queries and of keys and values, their size, the factor on
    scores and their cap, whether queries come with gates, and the longest sequence; gated delta nets, and their sizes
    if there are any."""

    layers: int
    queries: int
    keys: int
    size: int
    scale: float
    cap: float | None
    gated: bool
    context_length: int
    delta_layers: int = 0
    delta: DeltaNet | None = None

    @classmethod
    def of(cls, architecture: Architecture) -> AnswerShape:
        """Of a model whose layers of a kind have the same sizes, at least one of them with attention."""
        mixers = [layer.mixer for layer in architecture.layers]
        attending = [mixer for mixer in mixers if isinstance(mixer, Attention)]
        nets = [mixer for mixer in mixers if isinstance(mixer, DeltaNet)]
        one = attending[0]
        sizes = (one.queries, one.keys, one.size, one.scale, one.cap, one.gated, architecture.context)
        return cls(len(attending), *sizes, len(nets), nets[0] if nets else None)

    @property
    def states(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one sequence's states in one delta net; empty for a model without one."""
        net = self.delta
        if net is None:
            return (0,), (0,)
        channels = 2 * net.key_heads * net.key_size + net.value_heads * net.value_size
        return (net.kernel - 1, channels), (net.value_heads, net.key_size, net.value_size)

    @property
    def state_bytes(self) -> int:
        """Of all states of a slot, those that are kept included."""
        numbers = sum(map(math.prod, self.states))
        return (1 + KEPT_STATES) * self.delta_layers * numbers * torch.float32.itemsize


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
        rows: of the convolutions, fp32 [delta nets, slots, w - 1, M]: what they last saw.
        states: of the recurrences, fp32 [delta nets, slots, H, d, e].
        whole: whether a slot's states have gone over all of its ids, and no more.
        kept: states of a slot by how many of its ids they have gone over.
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
        wide = torch.promote_types(dtype, torch.float32)
        self.rows, self.states = (
            torch.zeros(shape.delta_layers, slots, *one, dtype=wide, device=device) for one in shape.states
        )
        self.whole = [True] * slots
        self.kept: list[dict[int, States]] = [{} for _ in range(slots)]

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

    def keep_common(self, ids: Sequence[int], slot: int) -> tuple[int, list[int]]:
        """Let a slot hold as many of the ids as there is, in itself or another one, but never the last one.

        Returns:
            how many it holds now, and after how many its states are to be kept while the others are read.
        """
        stretched, most = self.is_stretched(len(ids)), len(ids) - 1
        common = [
            min(most, _common_beginning(held, ids)) if kind == stretched else 0
            for held, kind in zip(self.ids, self.stretched, strict=True)
        ]
        usable = [self._usable(number, count) for number, count in enumerate(common)]
        best = max(range(len(usable)), key=usable.__getitem__)
        kept = usable[best]
        if kept == usable[slot]:
            best = slot
        self._copy(best, slot, kept)
        self.ids[slot], self.stretched[slot] = list(ids[:kept]), stretched
        if not self.shape.delta_layers:
            return kept, []
        return kept, [end for end in sorted({max(common), most - LAST_TOKENS}) if end > kept + LAST_TOKENS]

    def move(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        self._copy(source, target, len(self.ids[source]))
        self.ids[target], self.stretched[target] = list(self.ids[source]), self.stretched[source]

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Note that a slot holds more tokens, once all layers have kept what they keep of them."""
        self.ids[slot] += ids
        self.whole[slot] = True

    def keep_states(self, slot: int) -> None:
        """Keep a slot's states as they are now."""
        kept = self.kept[slot]
        kept[len(self.ids[slot])] = self.rows[:, slot].clone(), self.states[:, slot].clone()
        while len(kept) > KEPT_STATES:
            del kept[sorted(kept)[-2]]

    def _usable(self, slot: int, common: int) -> int:
        """How many of a slot's first tokens can be reused, at most those in common."""
        held = len(self.ids[slot])
        if not self.shape.delta_layers or (common == held and self.whole[slot]):
            return common
        return max((count for count in self.kept[slot] if count <= common), default=0)

    def is_stretched(self, length: int) -> bool:
        """Whether a sequence of this many tokens has the positions of a long one."""
        return self.stretched_from is not None and length > self.stretched_from

    def _check(self, length: int) -> None:
        if length > self.shape.context_length:
            raise ValueError(f"{length} tokens, but the model's context is {self.shape.context_length}")

    def _copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold what another one, or itself, holds of its first tokens."""
        if source != target:
            for held in (self.keys, self.values):
                held[:, target, :, :length] = held[:, source, :, :length]
        if not self.shape.delta_layers:
            return
        if length == len(self.ids[source]) and self.whole[source]:
            states = self.rows[:, source], self.states[:, source]
        else:
            states = self.kept[source].get(length)
        for held, state in zip((self.rows, self.states), states or (0.0, 0.0), strict=True):
            held[:, target] = state
        self.kept[target] = {count: states for count, states in self.kept[source].items() if count <= length}
        self.whole[target] = True


def _common_beginning(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
