"""What merging changed: logits of the merged model against those of base and adapter, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.adapters.lora import merge_lora
from qingtune.adapters.merge_stored import MergedWeights, StoredAdapter
from qingtune.adapters.peft_files import load_adapter
from qingtune.answering.assembly import Assembly
from qingtune.answering.generate import Decoding, generate_many
from qingtune.answering.load import load_decoder, open_model
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError
from qingtune.kernels.device import Hardware, give_back_memory
from qingtune.models.load import load_model
from qingtune.models.stored_weights import StoredWeights
from qingtune.output.console import labelled

ANSWER_TOKENS = 32
ROWS_AT_A_TIME = 32  # positions with logits in memory at once
# Merging in fp32 against the unmerged adapter: only the order of sums differs. The largest difference of two
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


def read_back(folder: Path, base: Path, adapter: StoredAdapter) -> Generator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each tensor of a written model: its name, what was merged, and what the files hold, one at a time.

    Raises:
        UserError: a tensor of the base is missing in the files.
    """
    weights, written = MergedWeights(base, adapter), StoredWeights(folder)
    for name in written.shapes:
        yield name, weights.read(name), written.read(name)
        give_back_memory()
    if missing := sorted(set(weights.shapes) - set(written.shapes)):
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
    before, merging = _side(base, adapter, sequences, hardware), None
    if rounded:
        merging = _compare(before, _side(base, adapter, sequences, hardware, merged=True), prompts)
        give_back_memory()  # what the merged side took
    after = _side(written, None, sequences, hardware)
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


@dataclass(frozen=True)
class _Side:
    """One of the models that are compared, in fp32.

    Attributes:
        states: what its head sees at every place of each sequence, [T, D].
        logits: the head: [T, D] -> [T, V].
    """

    states: list[torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]

    def loss(self, first: int, samples: Sequence[Sample]) -> float:
        """Mean cross-entropy over trained tokens, in nats, of samples that are the sequences from `first` on."""
        losses: list[torch.Tensor] = []
        for states, sample in zip(self.states[first:], samples, strict=True):
            ids = torch.from_numpy(sample.token_ids).long()
            places = torch.from_numpy(sample.trained).nonzero()[:, 0]
            for part in places[places > 0].split(ROWS_AT_A_TIME):
                logits = self.logits(states[part - 1])
                losses.append(F.cross_entropy(logits, ids[part].to(logits.device), reduction="none").double())
        return float(torch.cat(losses).mean())


def _side(
    folder: Path,
    adapter: StoredAdapter | None,
    sequences: Sequence[Sequence[int]],
    hardware: Hardware,
    *,
    merged: bool = False,
) -> _Side:
    """A model that has gone over sequences, where our kernels can with one of its layers in memory at a time.

    With `merged` the adapter is merged into the weights first, otherwise computed separately.
    """
    exact = replace(hardware, dtype=torch.float32)
    model, weights, reason = open_model(folder, adapter, None, exact)
    if reason is None:
        decoder = Assembly(model, weights, exact, lazy=True, apart=not merged).decoder(len(sequences))
        return _Side(decoder.hidden_states(sequences), decoder.logits_of)
    whole: Any = load_model(folder, torch.float32)
    if adapter:
        load_adapter(whole, adapter.folder)
    if merged:
        merge_lora(whole)
    base = whole.eval().base_model
    states = [base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0] for ids in sequences]
    return _Side(states, whole.get_output_embeddings())


def _compare(before: _Side, after: _Side, prompts: Sequence[Sequence[int]]) -> LogitDifference:
    """Compare all sequences; the first ones are prompts with answers."""
    places = agreed = same_answers = 0
    largest, sums = 0.0, torch.zeros(4, dtype=torch.float64)
    for number, (one, two) in enumerate(zip(before.states, after.states, strict=True)):
        agreeing: list[bool] = []  # where the likeliest token is the same
        for some, others in zip(one.split(ROWS_AT_A_TIME), two.split(ROWS_AT_A_TIME), strict=True):
            first, second = before.logits(some), after.logits(others)
            agreeing += (first.argmax(1) == second.argmax(1)).tolist()
            squares = first.square().sum(dtype=torch.float64)
            apart = second.sub_(first).abs_()
            largest = max(largest, float(apart.max()))
            totals = (first.sum(dtype=torch.float64), squares, apart.sum(dtype=torch.float64))
            sums += torch.tensor([first.numel(), *map(float, totals)], dtype=torch.float64)
        places, agreed = places + len(agreeing), agreed + sum(agreeing)
        same_answers += number < len(prompts) and all(agreeing[len(prompts[number]) - 1 : -1])
    numbers, total, squares, apart = sums.tolist()
    return LogitDifference(
        places=places,
        largest=largest,
        mean=apart / numbers,
        spread=max(0.0, squares / numbers - (total / numbers) ** 2) ** 0.5,
        agree=agreed / places,
        answers=len(prompts),
        same_answers=same_answers,
    )
