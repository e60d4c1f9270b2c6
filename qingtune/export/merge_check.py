"""What merging changed: logits of the merged model against those of base and adapter, and greedy answers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from qingtune.adapters.lora import merge_lora
from qingtune.adapters.merge_stored import EMBEDDING, StoredAdapter
from qingtune.adapters.peft_files import load_adapter
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.generate import Decoding, generate_many
from qingtune.answering.load import Assembly, load_decoder, open_model
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError
from qingtune.kernels.device import Hardware, give_back_memory
from qingtune.models.find import read_model_config
from qingtune.models.load import load_model
from qingtune.models.stored_weights import StoredWeights
from qingtune.output.console import labelled

ANSWER_TOKENS = 32
ROWS_AT_A_TIME = 32  # places whose logits are there at once
# Merging in fp32 against the adapter beside its weights: what changes the order of sums. The largest difference of two
# logits, as a share of the logits' standard deviation.
MOST_MERGING_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class LogitDifference:
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


@dataclass(frozen=True)
class Lost:
    """What storing the merged weights lost, against the adapter on the base's weights.

    Attributes:
        merging: weights merged in fp32, before anything is rounded.
        result: the written model.
        samples: with answers of their own.
        losses: per token of these answers on average, of base and adapter and of the written model; None without any.
    """

    merging: LogitDifference
    result: LogitDifference
    samples: int = 0
    losses: tuple[float, float] | None = None


class _Side(Protocol):
    """One of the models that are compared, in fp32."""

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


def read_back(folder: Path, base: Path, adapter: StoredAdapter) -> Generator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each tensor of a written model: its name, what was merged, and what the files hold, one at a time.

    Raises:
        UserError: a tensor of the base is missing in the files.
    """
    stored, written = StoredWeights(base), StoredWeights(folder)
    for name in written.shapes:
        weight = stored.read(name if name in stored.shapes else EMBEDDING)  # of which a head of its own is made
        yield name, adapter.merged(name, weight), written.read(name)
        give_back_memory()
    if missing := sorted(set(stored.shapes) - set(written.shapes)):
        raise UserError(f"{missing[0]} is missing in the merged files; they were removed", where=str(folder))


def check_rounded_once(folder: Path, base: Path, adapter: StoredAdapter) -> set[torch.dtype]:
    """Read a written model back: each weight must be the merged one, rounded to the dtype in which it is stored.

    Returns:
        the dtypes of the weights that the adapter changes.

    Raises:
        UserError: a weight is another.
    """
    dtypes: set[torch.dtype] = set()
    for name, merged, found in read_back(folder, base, adapter):
        check_same(name, found, merged.to(found.dtype), folder)
        if name in adapter.names:
            dtypes.add(found.dtype)
    return dtypes


def check_same(name: str, found: torch.Tensor, wanted: torch.Tensor, folder: Path) -> None:
    """Compare a tensor that was read back, bit for bit.

    Raises:
        UserError: it is not what was to be written.
    """
    one, two = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, wanted))
    if found.shape != wanted.shape or not torch.equal(one, two):
        raise UserError(f"{name} differs from the merged weight; nothing was written", where=str(folder))


def judge_merging(merging: LogitDifference) -> str:
    """How far merging alone, in fp32, is from base and adapter, for the user.

    Raises:
        UserError: further than the order of sums explains.
    """
    share = merging.largest / (merging.spread or 1.0)  # logits that are all the same have no spread
    difference = f"{merging.largest:.2g} at most, {share:.2g} of their spread"
    if not share <= MOST_MERGING_DIFFERENCE:
        raise UserError(
            f"merged in fp32, the logits differ from those of base + adapter by {difference}, where "
            f"{MOST_MERGING_DIFFERENCE:g} is allowed; nothing was written"
        )
    return (
        f"Merged in fp32, before anything is rounded, the model equals base + adapter: over {merging.places:,} places "
        f"the logits differ by {difference} ({MOST_MERGING_DIFFERENCE:g} is allowed)."
    )


@torch.inference_mode()
def measure_lost(
    base: Path,
    adapter: StoredAdapter,
    written: Path,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    stop_ids: frozenset[int],
    hardware: Hardware,
    *,
    rounded: bool = True,
) -> Lost:
    """Compare a written model with base and adapter in fp32, in which they differ by what storing rounded alone.

    The written model answers the prompts by the likeliest tokens, as it will for the user; then all go over prompts
    and answers, and over samples. An answer counts as the same where both would have chosen the same token at each of
    its places. As rounding would hide faults of the merging, the merged weights are compared without it too.

    Args:
        samples: with answers, whose loss is compared.
        rounded: whether the written weights differ from the merged ones, so that these are compared by themselves.
    """
    sequences = _answered(written, prompts, stop_ids, hardware)
    sequences += [sample.token_ids.tolist() for sample in samples]
    slots = len(sequences)
    before = _States(_side(base, adapter, hardware, slots), sequences)
    merging = (
        _compare(before, _States(_merged_side(base, adapter, hardware, slots), sequences), prompts) if rounded else None
    )
    give_back_memory()  # what the merged side took
    after = _States(_side(written, None, hardware, slots), sequences)
    result = _compare(before, after, prompts)
    losses = (before.loss(len(prompts), samples), after.loss(len(prompts), samples)) if samples else None
    return Lost(merging or result, result, len(samples), losses)


def _answered(
    folder: Path, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], hardware: Hardware
) -> list[list[int]]:
    """Prompts with the greedy answers of the model as it answers for the user."""
    with labelled(None):
        decoder = load_decoder(folder, None, None, hardware, None, len(prompts))
    greedy = Decoding(max_new_tokens=ANSWER_TOKENS, temperature=0)
    answers = dict(generate_many(decoder, prompts, [greedy] * len(prompts), stop_ids))
    del decoder
    give_back_memory()
    return [[*prompt, *answers[number]] for number, prompt in enumerate(prompts)]


class _States:
    """What a model's head sees at every place of sequences."""

    def __init__(self, side: _Side, sequences: Sequence[Sequence[int]]) -> None:
        self.side, self.states = side, side.hidden_states(sequences)

    def loss(self, first: int, samples: Sequence[Sample]) -> float:
        """Mean cross-entropy over trained tokens, in nats, of samples that are the sequences from `first` on."""
        losses: list[torch.Tensor] = []
        for states, sample in zip(self.states[first:], samples, strict=True):
            ids = torch.from_numpy(sample.token_ids).long()
            places = torch.from_numpy(sample.trained).nonzero()[:, 0]
            for part in places[places > 0].split(ROWS_AT_A_TIME):
                logits = self.side.logits(states[part - 1])
                losses.append(F.cross_entropy(logits, ids[part].to(logits.device), reduction="none").double())
        return float(torch.cat(losses).mean())


def _compare(before: _States, after: _States, prompts: Sequence[Sequence[int]]) -> LogitDifference:
    """Compare all sequences; the first ones are prompts with answers."""
    totals = _Totals()
    same = 0
    for number, (one, two) in enumerate(zip(before.states, after.states, strict=True)):
        agreeing = totals.add(before.side, after.side, one, two)
        same += number < len(prompts) and all(agreeing[len(prompts[number]) - 1 : -1])
    return totals.comparison(len(prompts), same)


class _MergedWeights(StoredWeights):
    """A base's weights with an adapter merged in, in fp32, one at a time."""

    def __init__(self, base: Path, adapter: StoredAdapter) -> None:
        super().__init__(base)
        self._adapter = adapter

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own."""
        weight = super().read(name if name in self.shapes else EMBEDDING)  # of which a head of its own is made
        return self._adapter.merged(name, weight)

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor that stays in its file if the adapter does not change it."""
        return self.read(name) if name in self._adapter.names else super().mapped(name)


def _merged_side(base: Path, adapter: StoredAdapter, hardware: Hardware, slots: int) -> _Side:
    exact = Hardware(hardware.device, torch.float32, hardware.reason)
    model, _, reason = open_model(base, None, exact)
    if reason is None:
        model.config.tie_word_embeddings &= not adapter.unties(read_model_config(base))
        assembly = Assembly(model, _MergedWeights(base, adapter), None, exact, merge=False)
        return _Layerwise(assembly.decoder(slots, lazy=True))
    whole = load_model(base, torch.float32)
    load_adapter(whole, adapter.folder)
    merge_lora(whole)
    return _Modules(whole.eval())


def _side(folder: Path, adapter: StoredAdapter | None, hardware: Hardware, slots: int) -> _Side:
    exact = Hardware(hardware.device, torch.float32, hardware.reason)
    model, stored, reason = open_model(folder, None, exact)
    if reason is None:
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

    def comparison(self, answers: int, same_answers: int) -> LogitDifference:
        """What came of it."""
        mean = self.sum / self.numbers
        return LogitDifference(
            places=self.places,
            largest=self.largest,
            mean=self.apart / self.numbers,
            spread=max(0.0, self.squares / self.numbers - mean**2) ** 0.5,
            agree=self.agreeing / self.places,
            answers=answers,
            same_answers=same_answers,
        )
