"""What merging changed: logits of the merged model against those of base and adapter, and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qingtune.adapters.files import load_adapter
from qingtune.adapters.stored import StoredAdapter
from qingtune.answering import Assembly, load_decoder, open_model
from qingtune.generation import Decoding, generate_many
from qingtune.hardware import Hardware, give_back_memory
from qingtune.kernels.cached_decoder import CachedDecoder
from qingtune.models.load import load_model

ANSWER_TOKENS = 32
ROWS_AT_A_TIME = 32  # places whose logits are there at once


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits are apart on the same tokens.

    Attributes:
        places: of prompts and answers.
        largest: difference of two logits; likewise mean.
        spread: standard deviation of the logits.
        agree: share of places at which the likeliest token is the same.
        answers: that were given by the merged model.
        same_answers: of these, at each place of which base and adapter find the same token the likeliest.
    """

    places: int
    largest: float
    mean: float
    spread: float
    agree: float
    answers: int
    same_answers: int


class _Side(Protocol):
    """One of the two models, in fp32."""

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]: ...

    def logits(self, states: torch.Tensor) -> torch.Tensor: ...


class _Layerwise:
    """A model of whose layers one is in memory at a time."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self.decoder = decoder
        self.hidden_states = decoder.hidden_states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, V]."""
        return self.decoder.head.multiply(states)


class _Modules:
    """A model of Transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the head sees, [T, D] each."""
        return [
            self.model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
            for ids in prompts
        ]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, V]."""
        return self.model.get_output_embeddings()(states)


@torch.inference_mode()
def compare_merged(
    base: Path,
    adapter: StoredAdapter,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    hardware: Hardware,
) -> Comparison:
    """Compare in fp32, in which the models differ only by what merging rounded.

    The merged model answers the prompts by the likeliest tokens, as it will for the user; then both go over prompts
    and answers. An answer counts as the same where both would have chosen the same token at each of its places.
    """
    decoder = load_decoder(merged, None, None, hardware, None, len(prompts), lambda _: None)
    greedy = Decoding(max_new_tokens=ANSWER_TOKENS, temperature=0)
    answers = dict(generate_many(decoder, prompts, [greedy] * len(prompts), stop_ids))
    del decoder
    give_back_memory()
    sequences = [[*prompt, *answers[number]] for number, prompt in enumerate(prompts)]
    before, after = _side(base, adapter, hardware, len(prompts)), _side(merged, None, hardware, len(prompts))
    totals = _Totals()
    same = 0
    for number, (one, two) in enumerate(
        zip(before.hidden_states(sequences), after.hidden_states(sequences), strict=True)
    ):
        agreeing = totals.add(before, after, one, two)
        same += all(agreeing[len(prompts[number]) - 1 : -1])
    return totals.comparison(len(prompts), same)


def _side(folder: Path, adapter: StoredAdapter | None, hardware: Hardware, slots: int) -> _Side:
    exact = Hardware(hardware.device, torch.float32, hardware.reason)
    model, stored, reason = open_model(folder, None, exact)
    if stored is not None and reason is None:
        return _Layerwise(Assembly(model, stored, adapter, exact, merge=False).decoder(slots, lazy=True))
    whole = load_model(folder, torch.float32)
    if adapter:
        load_adapter(whole, adapter.folder)
    return _Modules(whole.eval())


class _Totals:
    """Sums over places."""

    def __init__(self) -> None:
        self.places = self.agreeing = self.numbers = 0
        self.largest = self.apart = self.sum = self.squares = 0.0

    def add(self, before: _Side, after: _Side, one: torch.Tensor, two: torch.Tensor) -> list[bool]:
        """Count in the places of one sequence, [T, D] each; tells where the likeliest token is the same."""
        agreeing: list[bool] = []
        for start in range(0, len(one), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            first, second = before.logits(one[rows]), after.logits(two[rows])
            same: list[bool] = (first.argmax(1) == second.argmax(1)).tolist()
            agreeing += same
            self.agreeing += sum(same)
            self.places += len(first)
            self.numbers += first.numel()
            self.sum += float(first.sum(dtype=torch.float64))
            self.squares += float(first.square().sum(dtype=torch.float64))
            difference = second.sub_(first).abs_()
            self.largest = max(self.largest, float(difference.max()))
            self.apart += float(difference.sum(dtype=torch.float64))
        return agreeing

    def comparison(self, answers: int, same_answers: int) -> Comparison:
        """What came of it."""
        mean = self.sum / self.numbers
        return Comparison(
            places=self.places,
            largest=self.largest,
            mean=self.apart / self.numbers,
            spread=max(0.0, self.squares / self.numbers - mean**2) ** 0.5,
            agree=self.agreeing / self.places,
            answers=answers,
            same_answers=same_answers,
        )
