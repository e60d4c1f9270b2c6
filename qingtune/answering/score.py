"""What a model makes of a given text: the loss of each token, as in training, and whether it is the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qingtune.answering.generate import Decoder
from qingtune.data.batch import collate
from qingtune.data.tokenize import Sample


@dataclass(frozen=True)
class Score:
    """Of some tokens of a text.

    Attributes:
        loss: summed over the tokens, in nats; minus the log of their likelihood.
        tokens: how many.
        greedy: whether each is the likeliest one after those before it.
    """

    loss: float
    tokens: int
    greedy: bool


def score(decoder: Decoder, ids: Sequence[int], places: Sequence[int]) -> Score:
    """Score the tokens that follow places of a text.

    Args:
        ids: the text, at least one id.
        places: from 0 to len(ids) - 2, in order; the token after each one is scored, given all up to the place.
    """
    if not places:
        return Score(0.0, 0, True)
    targets = torch.tensor([ids[place + 1] for place in places])
    loss, agreeing, done = 0.0, 0, 0
    for logits in decoder.logits_at(ids, places):
        wanted = targets[done : done + len(logits)].to(logits.device)
        with torch.inference_mode():
            losses = F.cross_entropy(logits.float(), wanted, reduction="none").cpu()
            agreeing += int((logits.argmax(1) == wanted).sum())
        loss += float(losses.sum(dtype=torch.float64))
        done += len(logits)
    return Score(loss, len(places), agreeing == len(places))


def score_sample(decoder: Decoder, sample: Sample) -> Score:
    """Score what is trained in a sample."""
    batch = collate([sample])
    return score(decoder, sample.token_ids.tolist(), batch.predicting.tolist())
