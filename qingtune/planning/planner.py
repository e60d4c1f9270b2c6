"""Blueprint, settings, machine and data -> what a run would take, by each method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from qingtune.adapters.variants import TAKEN
from qingtune.config.methods import METHOD_SETTINGS
from qingtune.config.training import TrainConfig
from qingtune.data.order import Plan, sizes_of_groups, tokens_computed
from qingtune.errors import UserError
from qingtune.kernels.buffers import buffer_bytes
from qingtune.kernels.footprint import (
    BUFFERS_OF_FREE,
    EIGHT_BITS,
    TOKENS_PER_PASS_ON_CPU,
    PassTokens,
    autograd_bytes,
    autograd_logit_bytes,
    filled_up,
    layers_to_recompute,
    logit_numbers,
    optimizer_bytes,
)
from qingtune.machine.resources import Machine
from qingtune.planning.blueprint import Blueprint, Built

# Resident memory of a run over all that is counted: Python, torch, Transformers and what they allocate, measured on
# Linux (benchmarks/plan_grid.py) at two vocabularies; a tokenizer in memory grows with its own.
RUNTIME_ON_CPU = 430_000_000
RUNTIME_A_TOKEN_OF_VOCABULARY = 730
RUNTIME_AFTER_LOADING = 80_000_000  # of it, what is allocated only when the model is there
# What a CUDA context and its libraries' kernels take of a GPU before anything is allocated; not measured here.
CONTEXT_ON_GPU = 500_000_000
STEPS_TO_LOOK_AT = 200  # for the fullest pass
LONGEST_TRIED, LARGEST_BATCH_TRIED = 2**20, 1024

PARTS = {
    "weights": "weights",
    "quantized_weights": "quantised weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "runtime": "runtime",
    "loading": "more while loading",
}
METHODS = {
    "full": "full",
    "full8": "full, 8-bit states",
    "lora": "LoRA",
    "qlora8": "QLoRA 8",
    "qlora4": "QLoRA 4",
}
SETTINGS: dict[str, dict[str, Any]] = {**METHOD_SETTINGS, "full8": {"optim": "adamw_8bit"}}  # that choose each


@dataclass(frozen=True)
class Samples:
    """What the plan supposes of the data.

    Attributes:
        longest: tokens of the longest sample.
        mean: of all samples.
        trained_share: of the tokens.
        count: samples an epoch; None where they were not counted.
        fullest: the fullest pass, where the true samples are known; otherwise all are taken to be the longest.
        evaluates: whether there is evaluation data.
        evaluation: the fullest pass over it, likewise.
        basis: where these figures come from, for the user.
        lengths: of all samples, in tokens; empty where they were not counted.
    """

    longest: int
    mean: float
    trained_share: float
    count: int | None
    evaluates: bool
    basis: str
    lengths: tuple[int, ...] = ()
    fullest: PassTokens | None = None
    evaluation: PassTokens | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What one method takes.

    Attributes:
        parts: bytes by the keys of PARTS; they sum to the total.
        trainable: trained numbers.
        recompute: layers that are computed again in the backward pass.
        tokens: of the fullest pass.
    """

    parts: dict[str, int]
    trainable: int
    recompute: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def fits(self, machine: Machine) -> bool | None:
        """Whether that much is free; None where it is unknown."""
        return None if machine.free is None else self.total <= machine.free


def method_of(config: TrainConfig) -> str:
    """The key of METHODS that a configuration asks for."""
    return "full8" if config.method == "full" and config.optim in EIGHT_BITS else config.training_method


def as_method(config: TrainConfig, method: str) -> TrainConfig:
    """The same run by another method."""
    optim = config.optim
    if optim in EIGHT_BITS and "full" in (method, config.method):
        optim = "adamw_torch_fused"
    return config.model_copy(update={"use_lora": False, "use_qlora": False, "optim": optim, **SETTINGS[method]})


@dataclass(frozen=True)
class Planner:
    """Plans of one method on one machine, for any length and batch."""

    blueprint: Blueprint
    config: TrainConfig
    machine: Machine

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.config.method == "full"

    @cached_property
    def built(self) -> Built:
        """What the run holds before its first pass."""
        return self.blueprint.built(self.config, self.machine)

    @property
    def possible(self) -> bool:
        """Whether the method can train this model with the other settings as they are."""
        if self.config.method == "qlora" and self.config.init_lora_weights in TAKEN:
            return False  # as config.load has it
        try:
            return bool(self.built)
        except UserError:
            return False

    @property
    def fast(self) -> bool:
        """Whether kernels of our own compute it; otherwise activations are a rougher estimate."""
        return self.built.kernels is not None

    def shares(self, longest: int) -> bool:
        """Whether samples of up to `longest` tokens may share their beginning, as decoder.TrainingDecoder has it."""
        limit = self.built.short_context
        return self.fast and (limit is None or longest <= limit)

    @cached_property
    def fixed(self) -> dict[str, int]:
        """The parts that do not depend on the data."""
        built, optim = self.built, self.config.optim
        if optim in EIGHT_BITS and self.machine.kind == "mps":
            optim = "adamw_torch"
        return {
            "weights": built.weights,
            "quantized_weights": built.quantized,
            "adapters": built.adapters + built.taken,
            "gradients": built.gradients,
            "optimizer_states": optimizer_bytes(optim, built.trainable),
            "runtime": self.runtime,
        }

    @property
    def runtime(self) -> int:
        """What is there before anything of the model is."""
        if self.machine.kind == "cuda":
            return CONTEXT_ON_GPU
        return RUNTIME_ON_CPU + RUNTIME_A_TOKEN_OF_VOCABULARY * self.blueprint.vocabulary

    @cached_property
    def loading(self) -> int:
        """Bytes at the fullest moment of loading, in the memory in which the run computes.

        A model that is converted while it is read, or copied out of its file, is there twice: as the pages of the file
        and as weights; of one that is quantised, the largest tensor is, where it is converted. On a GPU that moment is
        in main memory.
        """
        if self.machine.kind == "cuda":
            return 0
        blueprint, built = self.blueprint, self.built
        stored, held = blueprint.stored_itemsize, built.weight_itemsize
        if self.config.method == "qlora" and not blueprint.renamed:
            # Experts are read whole and quantised one by one.
            read = blueprint.largest_read * stored if held != stored or blueprint.reaches_experts else 0
            return self.runtime - RUNTIME_AFTER_LOADING + built.weights + built.quantized + read
        whole = self.runtime + blueprint.parameters * held
        if self.config.method == "qlora":
            return whole + built.quantized
        if blueprint.by_tensor:
            return whole + blueprint.largest_read * stored
        return whole + (blueprint.parameters * stored if self.full or held != stored else 0)

    def plan_for(self, samples: Samples) -> MemoryPlan:
        """The plan for these data."""
        return self.plan(*self._passes(samples))

    def least_for(self, samples: Samples) -> int:
        """Bytes at the peak with every layer recomputed, by which methods compare."""
        return self.plan(*self._passes(samples), self.blueprint.layers).total

    def plan(self, work: PassTokens, evaluation: PassTokens | None = None, recompute: int | None = None) -> MemoryPlan:
        """The plan for passes of this size, and for this many recomputed layers, by default as the run would."""
        work, evaluation = _filled_up(work), evaluation and _filled_up(evaluation)
        if recompute is None:
            recompute = self._recompute(work, evaluation)
        parts = dict(self.fixed)
        parts["activations"], parts["logits"] = self._pass_bytes(recompute, work, evaluation)
        parts["loading"] = max(0, self.loading - sum(parts.values()))
        ordered = {name: parts[name] for name in PARTS}
        return MemoryPlan(ordered, self.built.trainable, recompute, work.tokens)

    def _recompute(self, work: PassTokens, evaluation: PassTokens | None) -> int:
        choice, layers, room = self.config.gradient_checkpointing, self.blueprint.layers, None
        if not self.fast:
            return layers if choice is True else 0
        if self.machine.free is not None:
            room = BUFFERS_OF_FREE * (self.machine.free - sum(self.fixed.values()))
        # As the engine counts, which does not know the samples.
        least = TOKENS_PER_PASS_ON_CPU if self.machine.kind == "cpu" else 0

        def fullest(one: PassTokens) -> PassTokens:
            tokens = max(one.tokens, least)
            return PassTokens(tokens, tokens, one.longest)

        passes = fullest(work), evaluation and fullest(evaluation)
        return layers_to_recompute(choice, layers, lambda count: sum(self._pass_bytes(count, *passes)), room)

    def _pass_bytes(self, recompute: int, work: PassTokens, evaluation: PassTokens | None) -> tuple[int, int]:
        """Bytes of activations and logits, on the fast kernels or in the model's own modules."""
        built, itemsize, vocabulary = self.built, self.machine.itemsize, self.blueprint.vocabulary
        if built.kernels is not None:
            sizes, how = built.kernels
            return buffer_bytes(sizes, replace(how, recompute=recompute), work, evaluation)
        if built.one_by_one:
            work = PassTokens(work.longest, min(work.predicting, work.longest - 1), work.longest)
        trains_head = self.full or bool(self.config.modules_to_save)
        logits = itemsize * logit_numbers(
            vocabulary, work.predicting, trains_head=trains_head, large=self.machine.kind != "cpu"
        )
        if not built.plain_head:
            logits = autograd_logit_bytes(vocabulary, work.predicting, itemsize)
        sizes = self.blueprint.general_sizes
        kept = autograd_bytes(sizes, work.tokens, itemsize, built.low_rank, built.adapter_width, recompute)
        return kept, logits

    def _passes(self, samples: Samples) -> tuple[PassTokens, PassTokens | None]:
        """The fullest passes of training and evaluation."""
        work = samples.fullest or self.even_pass(samples.longest, self.config.per_device_train_batch_size)
        return work, self._evaluation(samples)

    def _evaluation(self, samples: Samples) -> PassTokens | None:
        if samples.evaluation is not None or not samples.evaluates:
            return samples.evaluation
        return self.even_pass(samples.longest, self.config.per_device_eval_batch_size)

    def even_pass(self, length: int, batch: int) -> PassTokens:
        """The pass of a micro-batch of samples of one length, every token trained; batch.split_evenly cuts it so."""
        groups = -(-batch // max(1, most_tokens_of(self.machine) // length))
        together = -(-batch // groups)
        return PassTokens(together * length, together * (length - 1), length)

    def longest_that_fits(self, samples: Samples) -> int:
        """Tokens of the longest sample, at the batch of the settings, in steps of 8; 0 if none fits."""
        most = min(LONGEST_TRIED, self.blueprint.context or LONGEST_TRIED)
        batch = self.config.per_device_train_batch_size
        return 8 * _largest(most // 8, lambda n: self._fits(self.even_pass(8 * n, batch), samples))

    def largest_batch_that_fits(self, samples: Samples) -> int:
        """Samples a micro-batch at the longest length, LARGEST_BATCH_TRIED for that many or more; 0 if none fits."""
        return _largest(LARGEST_BATCH_TRIED, lambda n: self._fits(self.even_pass(samples.longest, n), samples))

    def has_to_recompute(self, samples: Samples, batch: int, longest: int) -> bool:
        """Whether the largest that fit (0: none) do so only with gradient_checkpointing true, as "auto" leaves less."""
        evaluation = self._evaluation(samples)
        sizes = ((samples.longest, batch), (longest, self.config.per_device_train_batch_size))
        works = [self.even_pass(length, size) for length, size in sizes if length and size]
        return any(self.plan(work, evaluation).fits(self.machine) is False for work in works)

    def _fits(self, work: PassTokens, samples: Samples) -> bool:
        """Whether it fits, with "auto", which leaves room for a step's moments, also with all layers recomputed."""
        evaluation = self._evaluation(samples)
        tries = [None, self.blueprint.layers] if self.config.gradient_checkpointing == "auto" else [None]
        return any(self.plan(work, evaluation, recompute).fits(self.machine) for recompute in tries)


def most_tokens_of(machine: Machine) -> int:
    """Tokens that a pass is cut to; on a GPU a micro-batch is one pass."""
    return TOKENS_PER_PASS_ON_CPU if machine.kind == "cpu" else 2**31


def training_batches(count: int, config: TrainConfig, processes: int = 1) -> list[list[int]]:
    """The numbers of the samples of each micro-batch of one process, in the first steps of a run over this many."""
    order = Plan.of(config, count, processes)
    steps = range(min(order.steps_per_epoch, STEPS_TO_LOOK_AT))
    return [share.tolist() for step in steps for share in order.micro_batches(step, 0)]


def fullest_group(
    lengths: Sequence[int],
    batches: Iterable[Sequence[int]],
    most_tokens: int,
    shared: Callable[[Sequence[int]], Sequence[int]] | None = None,
) -> list[int]:
    """The numbers of the samples that make up the pass of most tokens.

    Args:
        lengths: of the samples, in tokens.
        batches: the numbers of the samples of each micro-batch.
        most_tokens: of a pass.
        shared: numbers of samples -> what each begins with like the one before it; None where nothing is shared.
    """
    found, most = list[int](), 0
    for numbers in batches:
        sizes = [lengths[number] for number in numbers]
        alike = [0] * len(numbers) if shared is None else shared(numbers)
        for start, end in pairwise(accumulate(sizes_of_groups(sizes, most_tokens, alike), initial=0)):
            tokens = tokens_computed(sizes[start:end], alike[start:end])
            if tokens > most:
                found, most = list(numbers[start:end]), tokens
    return found


def _filled_up(work: PassTokens) -> PassTokens:
    return replace(work, tokens=filled_up(work.tokens))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not; what is larger is taken to need more."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
