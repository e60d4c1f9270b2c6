"""Decoding with a key/value cache, and streaming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qingtune.data.tokenize import Template


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
        decoding: the settings.
        generator: on the CPU, where tokens are drawn, so that a seed gives the same text on every device.
    """
    scores = logits.float()
    if decoding.repetition_penalty != 1:
        old = scores[seen]
        penalty = decoding.repetition_penalty
        scores = scores.scatter(0, seen, torch.where(old > 0, old / penalty, old * penalty))
    if decoding.temperature == 0:
        return int(scores.argmax())
    scores = scores / decoding.temperature
    if 0 < decoding.top_k < len(scores):
        scores, ids = scores.topk(decoding.top_k)
    else:
        scores, ids = scores.sort(descending=True)
    shares = scores.softmax(0).cpu()
    if decoding.top_p < 1:
        before = shares.cumsum(0) - shares
        shares = torch.where(before < decoding.top_p, shares, 0.0)
    return int(ids[int(torch.multinomial(shares, 1, generator=generator))])


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int], decoding: Decoding, stop_ids: frozenset[int]) -> Iterator[int]:
    """Yield new token ids as they are made; a stop id is yielded too, as the last one.

    Args:
        model: a causal language model in evaluation mode.
        prompt: at least one id.
        decoding: the settings.
        stop_ids: ids that end the answer.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(decoding.seed)
    seen = torch.tensor(list(prompt), device=device)
    cache = DynamicCache(config=model.config)
    step_input = seen[None]
    for _ in range(decoding.max_new_tokens):
        logits = model(input_ids=step_input, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = choose(logits, seen, decoding, generator)
        yield token
        if token in stop_ids:
            return
        step_input = torch.tensor([[token]], device=device)
        seen = torch.cat([seen, step_input[0]])


class Answer:
    """An answer as it is made: iterate for its pieces of text; then `text`, `tokens` and `ended` tell the rest."""

    def __init__(self, template: Template, tokens: Iterable[int]) -> None:
        self._template, self._source = template, tokens
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        """Yield text as soon as it is whole characters: one character may take several tokens."""
        for token in self._source:
            self.ended = token in self._template.stop_ids
            self.tokens.append(token)
            text = self._decode()
            if not text.endswith("\ufffd") and len(text) > len(self.text):
                piece, self.text = text[len(self.text) :], text
                yield piece
        rest = self._decode()[len(self.text) :]
        if rest:
            self.text += rest
            yield rest

    def _decode(self) -> str:
        return cast("Any", self._template.tokenizer).decode(self.tokens, skip_special_tokens=True)
