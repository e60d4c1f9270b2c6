"""Decoding: one answer or many at a time, and streaming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qingtune.config.types import LEAST_TEMPERATURE
from qingtune.data.tokenize import Template
from qingtune.data.tokenizer_calls import decode
from qingtune.errors import UserError

MOST_WAITING = 32  # tokens that may wait for the rest of a character; of those that are no UTF-8 more could follow


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. temperature 0: the likeliest one; top_k 0 and top_p 1: from all."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    repetition_penalty: float = 1.0
    seed: int = 42


def choose(logits: torch.Tensor, seen: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """One token from logits [V].

    Args:
        logits: of the next token, any float dtype.
        seen: int64 ids of prompt and answer so far, for the repetition penalty (Keskar et al. 2019,
            https://arxiv.org/abs/1909.05858: positive logits are divided by it, negative ones multiplied).
        generator: on the CPU, where tokens are drawn, so that a seed gives the same text on every device.

    Raises:
        UserError: the logits are no numbers.
    """
    scores = logits.float()
    if decoding.repetition_penalty != 1:
        old = scores[seen]
        penalty = decoding.repetition_penalty
        scores = scores.scatter(0, seen, torch.where(old > 0, old / penalty, old * penalty))
    best, likeliest = scores.max(0)
    if not bool(best.isfinite()):
        raise UserError(
            "the model's logits are not finite, so no token can be chosen",
            fix="Its weights or the adapter's are broken, or too large for this dtype.",
        )
    if decoding.temperature < LEAST_TEMPERATURE:
        return int(likeliest)
    scores = scores / decoding.temperature
    if 0 < decoding.top_k < len(scores):
        scores, ids = scores.topk(decoding.top_k)
    else:
        scores, ids = scores.sort(descending=True)
    shares = scores.softmax(0).cpu()
    if decoding.top_p < 1:
        before = shares.cumsum(0) - shares
        least = torch.finfo(shares.dtype).tiny  # a smaller top_p is 0 here, and the likeliest token always stays
        shares = torch.where(before < max(decoding.top_p, least), shares, 0.0)
    return int(ids[int(torch.multinomial(shares, 1, generator=generator))])


class Decoder(Protocol):
    """A model that reads token ids, in slots that each hold a sequence, and gives logits of the next one."""

    @property
    def slots(self) -> int:
        """Sequences held at a time."""
        ...

    def start(self, ids: Sequence[int], slot: int = 0) -> torch.Tensor:
        """Let a slot hold these ids, at least one; gives logits [V]."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """One more token for each of the first S slots; gives logits [S, V]."""
        ...

    def move(self, source: int, target: int) -> None:
        """Let a slot hold what another one holds."""
        ...

    def logits_at(self, ids: Sequence[int], places: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [n, V] that follow places of a text, in order, as many at a time as there is room for."""
        ...


class Draw:
    """Chooses the tokens of one answer, one after the other; the repetition penalty counts the prompt as seen."""

    def __init__(self, prompt: Sequence[int], decoding: Decoding) -> None:
        self.decoding = decoding
        self.tokens: list[int] = []
        self._generator = torch.Generator().manual_seed(decoding.seed)
        self._seen = torch.tensor(list(prompt) if decoding.repetition_penalty != 1 else [], dtype=torch.int64)

    def next(self, logits: torch.Tensor) -> int:
        """The next token, from logits [V]."""
        token = choose(logits, self._seen.to(logits.device), self.decoding, self._generator)
        self.tokens.append(token)
        if self.decoding.repetition_penalty != 1:
            self._seen = torch.cat([self._seen, torch.tensor([token])])
        return token

    def ended(self, stop_ids: frozenset[int]) -> bool:
        """Whether the last token ends the answer, or it is as long as it may be."""
        return self.tokens[-1] in stop_ids or len(self.tokens) == self.decoding.max_new_tokens


def generate(decoder: Decoder, prompt: Sequence[int], decoding: Decoding, stop_ids: frozenset[int]) -> Iterator[int]:
    """Yield new token ids after a prompt of at least one id, as they are made in the decoder's first slot.

    A stop id is yielded too, as the last one.
    """
    draw = Draw(prompt, decoding)
    logits = decoder.start(prompt)
    while True:
        token = draw.next(logits)
        yield token
        if draw.ended(stop_ids):
            return
        logits = decoder.step([token])[0]


def generate_many(
    decoder: Decoder, prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding], stop_ids: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts, each of at least one id, in as many slots as the decoder has.

    Long prompts come first, so that those answered together are of about one length and short ones fill the end.

    Yields:
        a prompt's number and its new ids, as answers end.
    """
    waiting = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    active: list[tuple[int, Draw]] = []
    while waiting or active:
        while waiting and len(active) < decoder.slots:
            number = waiting.pop()
            draw = Draw(prompts[number], decodings[number])
            draw.next(decoder.start(prompts[number], len(active)))
            if draw.ended(stop_ids):
                yield number, draw.tokens
            else:
                active.append((number, draw))
        if not active:
            return
        for (_, draw), logits in zip(active, decoder.step([draw.tokens[-1] for _, draw in active]), strict=True):
            draw.next(logits)
        for slot in reversed(range(len(active))):
            number, draw = active[slot]
            if draw.ended(stop_ids):
                yield number, draw.tokens
                last = active.pop()
                if slot < len(active):
                    active[slot] = last
                    decoder.move(len(active), slot)


class Answer:
    """An answer as it is made: iterate for its pieces of text; then `text`, `tokens` and `ended` tell the rest.

    Tokens are decoded one after the other, each with those of the piece before it, not with all: what a token adds to
    a text depends on its neighbours. A SentencePiece tokenizer drops the space in front of a text, WordPiece puts one
    before each word, and a character may take several tokens. Together the pieces are the text that `decode_answer`
    gives, but for bytes that are no UTF-8: characters that were whole stay, where SentencePiece's decoder replaces all
    bytes in a row.
    """

    def __init__(self, template: Template, tokens: Iterable[int]) -> None:
        self._template, self._source = template, tokens
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        added = template.tokenizer.added_tokens_decoder
        self._skipped = {number for number, token in added.items() if token.special}
        self._before, self._text_before = list[int](), ""
        self._waiting: list[int] = []

    def __iter__(self) -> Iterator[str]:
        """Yield text as soon as it is whole characters: one character may take several tokens."""
        for token in self._source:
            self.ended = token in self._template.stop_ids
            self.tokens.append(token)
            if token not in self._skipped:
                self._waiting.append(token)
                piece = self._rest()
                full = len(self._waiting) == MOST_WAITING
                if piece and (full or not piece.endswith("\ufffd")):
                    self._before, self._text_before = self._waiting, decode_answer(self._template, self._waiting)
                    self._waiting = []
                    self.text += piece
                    yield piece
                elif full:
                    self._waiting = []
        if rest := self._rest():
            self.text += rest
            yield rest

    def _rest(self) -> str:
        """The text of the tokens that wait for the rest of a character."""
        text = decode_answer(self._template, [*self._before, *self._waiting])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return decode_answer(self._template, self._waiting)  # bytes that spoil those of the piece before


def decode_answer(template: Template, tokens: Sequence[int]) -> str:
    """The text of an answer's tokens."""
    return decode(template.tokenizer, tokens, skip_special_tokens=True)
