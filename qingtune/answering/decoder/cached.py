"""Models for answering, of architectures that kernels/architecture.py describes: weights merged and packed, keys and
values kept in a static cache.

A prompt goes through in chunks; in the last layer only its last row goes beyond keys and values, and the head sees only
that row. What a slot of the cache holds already, another slot's beginning included, is not computed again: a chat's
turns, or prompts that begin alike.

Shapes: T new tokens, S slots that read one token each, D hidden size, d head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from qingtune.answering.decoder.cache import AnswerCache, AnswerShape
from qingtune.answering.decoder.joining import Chunk, Joining, TokenEach
from qingtune.answering.decoder.layer import AnswerLayer, AnswerNorm
from qingtune.answering.decoder.native.answer_step import AnswerStep
from qingtune.answering.decoder.native.matrices import NativeMatrix
from qingtune.answering.decoder.packed import Matrix
from qingtune.answering.decoder.rotary import Rotary
from qingtune.kernels.architecture import Architecture

CHUNK = 512  # tokens of a prompt computed at a time
PLACES_AT_A_TIME = 128  # of a text, with logits in memory at once: 39 MB in bf16 with Qwen's vocabulary


@dataclass(eq=False)
class CachedDecoder:
    """A model that reads token ids and gives the logits of the next one.

    Attributes:
        embedding: [V, D], likewise head.
        norm: the last one.
        slots: sequences held at a time.
        library: compiled kernels that compute a whole step, where all matrices are native ones.
    """

    architecture: Architecture
    embedding: torch.Tensor
    layers: Iterable[AnswerLayer]
    norm: AnswerNorm
    head: Matrix
    rotary: Rotary
    slots: int = 1
    library: ctypes.CDLL | None = None

    def __post_init__(self) -> None:
        self.dtype, self.device = self.rotary.any.dtype, self.rotary.any.device
        self.shape = AnswerShape.of(self.architecture)
        self._cache = self._empty_cache()
        self._step = None
        if self.library:
            layers, head = list(self.layers), cast("NativeMatrix", self.head)
            self._step = AnswerStep(self.library, self.shape, layers, self.norm, head, self.rotary)

    def slot_bytes(self, length: int) -> int:
        """The bytes of a slot that holds a sequence of this many tokens."""
        shape = self.shape
        return 2 * shape.layers * shape.keys * shape.size * length * self.dtype.itemsize + shape.state_bytes

    def make_slots(self, count: int, length: int) -> None:
        """Replace the slots by empty ones with room for sequences of this many tokens, allocated at once."""
        self.slots = count
        self._cache = self._empty_cache(length)

    def _empty_cache(self, length: int = 0) -> AnswerCache:
        self.rotary.reserve(length)
        return AnswerCache(
            self.shape, self.slots, self.dtype, self.device, length, stretched_from=self.rotary.stretched_from
        )

    def _reserve(self, length: int) -> None:
        """Make room for this many tokens a slot."""
        self._cache.reserve(length)
        self.rotary.reserve(self._cache.keys.shape[3])

    @torch.inference_mode()
    def start(self, ids: Sequence[int], slot: int = 0) -> torch.Tensor:
        """Let a slot hold these ids, at least one, and give the logits [V] of the next one."""
        self._reserve(len(ids))
        place, stops = self._cache.keep_common(ids, slot)
        last = None
        for end in (*stops, len(ids)):
            for start in range(place, end, CHUNK):
                last = self._read_chunk(ids[start : min(start + CHUNK, end)], slot)
            place = end
            if end in stops:
                self._cache.keep_states(slot)
        assert last is not None
        return self.logits_of(self.norm.apply(last))[0]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """One more token for each of the first S slots; gives the logits [S, V] of the next ones."""
        held = self._cache.ids[: len(tokens)]
        self._reserve(max(map(len, held)) + 1)
        self._stretch(held)
        x = self._embedded(tokens)
        if self._step:
            logits = self._capped(self._step.logits(x, self._cache))
        else:
            one = len(x) == 1
            joining = Chunk(self._cache, self.rotary, 0, 1) if one else TokenEach(self._cache, self.rotary, len(x))
            logits = self.logits_of(self.norm.apply(self._through(x, joining)))
        for slot, token in enumerate(tokens):
            self._cache.append(slot, [token])
        return logits

    def _stretch(self, held: Sequence[Sequence[int]]) -> None:
        """Read sequences again that become long with one more token, as all their positions change."""
        cache = self._cache
        for slot, ids in enumerate(held):
            if cache.is_stretched(len(ids) + 1) and not cache.stretched[slot]:
                again = list(ids)
                cache.ids[slot].clear()
                cache.stretched[slot] = True
                for start in range(0, len(again), CHUNK):
                    self._read_chunk(again[start : start + CHUNK], slot)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        self._cache.move(source, target)

    @torch.inference_mode()
    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the head sees at every place of prompts, each [T, D], one slot a prompt; every layer is asked for once.

        Nothing that the slots held stays, nor the memory that holds it.
        """
        self.make_slots(self.slots, max(map(len, prompts)))
        cache = self._cache
        cache.stretched = [cache.is_stretched(len(ids)) for ids in prompts]
        joinings = [Chunk(cache, self.rotary, slot, len(ids)) for slot, ids in enumerate(prompts)]
        states = [self._embedded(ids) for ids in prompts]
        for layer in self.layers:
            states = [layer.forward(x, joining) for x, joining in zip(states, joinings, strict=True)]
        self.make_slots(self.slots, 0)
        return [self.norm.apply(x) for x in states]

    @torch.inference_mode()
    def logits_at(self, ids: Sequence[int], places: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [n, V] that follow places of a text, some at a time; nothing that the slots held stays."""
        states = self.hidden_states([ids])[0][torch.tensor(list(places), device=self.device)]
        for part in states.split(PLACES_AT_A_TIME):
            yield self.logits_of(part)

    def _read_chunk(self, ids: Sequence[int], slot: int) -> torch.Tensor:
        """Put keys and values of more tokens into a slot; gives the last one's hidden state [1, D]."""
        x = self._through(self._embedded(ids), Chunk(self._cache, self.rotary, slot, len(ids)), only_last=True)
        self._cache.append(slot, ids)
        return x

    def _embedded(self, ids: Sequence[int]) -> torch.Tensor:
        x = self.embedding[torch.tensor(ids, device=self.embedding.device)].to(self.device, self.dtype)
        if self.architecture.embedding_scale == 1:
            return x
        return x * torch.tensor(self.architecture.embedding_scale, dtype=self.dtype, device=self.device)

    def _through(self, x: torch.Tensor, joining: Joining, *, only_last: bool = False) -> torch.Tensor:
        last = len(self.architecture.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, joining, only_last=only_last and number == last)
        return x

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """What the head makes of normed states: [T, D] -> [T, V]."""
        return self._capped(self.head.multiply(states))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.architecture.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
