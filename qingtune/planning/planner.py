"""Shape, settings, machine and data -> what a run would take, by each method; which settings would take less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from qingtune.config.training import TrainConfig
from qingtune.data.order import Plan, sizes_of_groups
from qingtune.kernels.footprint import (
    BUFFERS_OF_FREE,
    EIGHT_BITS,
    FAST_MODEL_TYPES,
    NF4_BYTES_A_WEIGHT,
    ROWS_MULTIPLE,
    TOKENS_PER_PASS_ON_CPU,
    Arithmetic,
    LayerSizes,
    PassTokens,
    autograd_bytes,
    autograd_logit_bytes,
    buffer_bytes,
    layers_to_recompute,
    optimizer_bytes,
)
from qingtune.machine.resources import Machine
from qingtune.models.shape import ModelShape
from qingtune.planning.trained_numbers import Trained, find_trained

# Resident memory of a run beside all that is counted: Python, torch, Transformers and what they allocate, measured on
# Linux (benchmarks/plan_grid.py) at two vocabularies; a tokenizer in memory grows with its own.
RUNTIME_ON_CPU = 430_000_000
RUNTIME_A_TOKEN_OF_VOCABULARY = 730
RUNTIME_AFTER_LOADING = 80_000_000  # of it, what is allocated only when the model is there
# What a CUDA context and its libraries' kernels take of a GPU before anything is allocated; not measured here.
CONTEXT_ON_GPU = 500_000_000
STEPS_TO_LOOK_AT = 200  # for the fullest pass
LONGEST_TRIED, LARGEST_BATCH_TRIED = 2**20, 1024
_TAKEN = ("pissa", "pissa_niter_16", "olora")

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
        method: a key of METHODS.
        parts: bytes by the keys of PARTS; they sum to the total.
        trainable: trained numbers.
        recompute: layers that are computed again in the backward pass.
        tokens: of the fullest pass.
        fast: whether the project's own kernels compute it; otherwise activations are a rougher estimate.
    """

    method: str
    parts: dict[str, int]
    trainable: int
    recompute: int
    tokens: int
    fast: bool

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def fits(self, machine: Machine) -> bool | None:
        """Whether that much is free; None where it is unknown."""
        return None if machine.free is None else self.total <= machine.free


def method_of(config: TrainConfig) -> str:
    """The key of METHODS that a configuration asks for."""
    if config.method == "full":
        return "full8" if config.optim in EIGHT_BITS else "full"
    return "lora" if config.method == "lora" else f"qlora{config.quantization_bit}"


def as_method(config: TrainConfig, method: str) -> TrainConfig:
    """The same run by another method."""
    adapters = method not in ("full", "full8")
    optim = config.optim
    if method == "full8":
        optim = optim if optim in EIGHT_BITS else "adamw_8bit"
    elif optim in EIGHT_BITS and (not adapters or config.method == "full"):
        optim = "adamw_torch_fused"
    update: dict[str, Any] = {
        "use_lora": adapters,
        "use_qlora": method.startswith("qlora"),
        "quantization_bit": 8 if method == "qlora8" else 4,
        "optim": optim,
    }
    return config.model_copy(update=update)


@dataclass(frozen=True)
class Planner:
    """Plans of one method on one machine, for any length and batch."""

    shape: ModelShape
    config: TrainConfig
    machine: Machine

    @cached_property
    def method(self) -> str:
        """Its key."""
        return method_of(self.config)

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.config.method == "full"

    @cached_property
    def trained(self) -> Trained:
        """What is trained."""
        return Trained() if self.full else find_trained(self.shape, self.config)

    @property
    def trainable(self) -> int:
        """Trained numbers."""
        return self.shape.parameters if self.full else self.trained.numbers

    @cached_property
    def fast(self) -> bool:
        """Whether kernels of our own compute it (engine.make_engine decides it so, with the model at hand)."""
        both = self.config.use_dora and self.config.lora_dropout > 0 and not self.full
        known = self.shape.model_type in FAST_MODEL_TYPES and self.shape.plain
        return known and not both and self.machine.kind != "mps"

    @cached_property
    def sizes(self) -> LayerSizes:
        """For the arithmetic of memory.py."""
        shape = self.shape
        return LayerSizes(
            layers=shape.layers,
            hidden=shape.hidden,
            inner=shape.inner,
            queries=shape.heads * shape.head_size,
            keys=shape.key_heads * shape.head_size,
            heads=shape.heads,
            vocabulary=shape.vocabulary,
            query_key_norm=shape.query_key_norm,
            ranks=self.trained.ranks,
        )

    @cached_property
    def weight_itemsize(self) -> int:
        """Bytes a number of dense weights; full training keeps them in fp32 but for our 8-bit optimizer on a CPU."""
        narrow = self.config.optim in EIGHT_BITS and self.machine.kind == "cpu"
        return 4 if self.full and not narrow else self.machine.itemsize

    @cached_property
    def fixed(self) -> dict[str, int]:
        """The parts that do not depend on the data."""
        shape, trained = self.shape, self.trained
        quantized = 0
        dense = shape.parameters + trained.untied - trained.whole
        if self.config.method == "qlora":
            packed = sum(module.shape[0] * module.shape[1] for module in shape.linear)
            rows = sum(module.shape[0] for module in shape.linear)
            dense -= packed
            four = self.config.quantization_bit == 4
            quantized = round(packed * NF4_BYTES_A_WEIGHT) if four else packed + 4 * rows
        taken = trained.adapters if self.config.init_lora_weights in _TAKEN and self.machine.kind == "cpu" else 0
        states = self.config.optim
        if states in EIGHT_BITS and self.machine.kind == "mps":
            states = "adamw_torch"
        return {
            "weights": dense * self.weight_itemsize,
            "quantized_weights": quantized,
            "adapters": 4 * (trained.numbers + taken),
            "gradients": self.trainable * (self.weight_itemsize if self.full else 4),
            "optimizer_states": optimizer_bytes(states, self.trainable),
            "runtime": self.runtime,
        }

    @property
    def runtime(self) -> int:
        """What is there before anything of the model is."""
        if self.machine.kind == "cuda":
            return CONTEXT_ON_GPU
        return RUNTIME_ON_CPU + RUNTIME_A_TOKEN_OF_VOCABULARY * self.shape.vocabulary

    @cached_property
    def loading(self) -> int:
        """Bytes at the fullest moment of loading, in the memory in which the run computes.

        A model that is converted while it is read, or copied out of its file, is there twice: as the pages of the file
        and as weights. On a GPU that moment is in main memory.
        """
        if self.machine.kind == "cuda":
            return 0
        numbers, as_stored = self.shape.parameters, self.weight_itemsize == self.shape.stored_itemsize
        if self.config.method == "qlora" and self.shape.plain:
            ends = max(m.parameters for m in self.shape.modules if m.kind in ("embedding", "head"))
            pages = self.fixed["quantized_weights"] + ends * self.shape.stored_itemsize  # of files that are being read
            held = self.fixed["weights"] + self.fixed["quantized_weights"]
            return self.runtime - RUNTIME_AFTER_LOADING + held + pages
        if self.config.method == "qlora":
            return self.runtime + numbers * self.weight_itemsize + self.fixed["quantized_weights"]
        twice = numbers * self.shape.stored_itemsize if self.full or not as_stored else 0
        return self.runtime + numbers * self.weight_itemsize + twice

    def plan(self, work: PassTokens, evaluation: PassTokens | None = None) -> MemoryPlan:
        """The plan for passes of this size."""
        return self._plan(work, evaluation, self._recompute(_filled_up(work), evaluation))

    def least_for(self, samples: Samples) -> int:
        """Bytes at the peak with every layer recomputed, by which methods compare."""
        return self._plan(*self._passes(samples), self.shape.layers).total

    def _plan(self, work: PassTokens, evaluation: PassTokens | None, recompute: int) -> MemoryPlan:
        work, evaluation = _filled_up(work), evaluation and _filled_up(evaluation)
        parts = dict(self.fixed)
        if self.fast:
            how = self._arithmetic(recompute)
            parts["activations"], parts["logits"] = buffer_bytes(self.sizes, how, work, evaluation)
        else:
            itemsize = self.machine.itemsize
            parts["activations"] = autograd_bytes(self.sizes, work, itemsize, self.trained.adapters, recompute)
            parts["logits"] = autograd_logit_bytes(self.shape.vocabulary, work, itemsize)
        parts["loading"] = max(0, self.loading - sum(parts.values()))
        ordered = {name: parts[name] for name in PARTS}
        return MemoryPlan(self.method, ordered, self.trainable, recompute, work.tokens, self.fast)

    def _recompute(self, work: PassTokens, evaluation: PassTokens | None) -> int:
        choice, layers = self.config.gradient_checkpointing, self.shape.layers
        if not self.fast:
            return layers if choice is True else 0
        room = None
        if self.machine.free is not None:
            room = BUFFERS_OF_FREE * (self.machine.free - sum(self.fixed.values()))
        # As the engine counts, which does not know the samples.
        least = TOKENS_PER_PASS_ON_CPU if self.machine.kind == "cpu" else 0

        def fullest(one: PassTokens) -> PassTokens:
            tokens = max(one.tokens, least)
            return PassTokens(tokens, tokens, one.longest)

        passes = fullest(work), evaluation and fullest(_filled_up(evaluation))

        def pass_bytes(recompute: int) -> int:
            return sum(buffer_bytes(self.sizes, self._arithmetic(recompute), *passes))

        return layers_to_recompute(choice, layers, pass_bytes, room)

    def _arithmetic(self, recompute: int) -> Arithmetic:
        trains_head = self.full or "lm_head" in self.trained.whole_names
        quantized = self.config.method == "qlora"
        return Arithmetic(
            itemsize=self.machine.itemsize,
            weight_itemsize=None if quantized else self.weight_itemsize,
            head_itemsize=4 if trains_head and not self.full else self.weight_itemsize,
            trains_weights=self.full,
            trains_head=trains_head,
            int8_units=quantized and self.config.quantization_bit == 8 and self.machine.int8_units,
            dora=self.config.use_dora and not self.full,
            dropout=self.config.lora_dropout > 0 and not self.full,
            recompute=recompute,
            gradient_below=self.full or "model.embed_tokens" in self.trained.whole_names,
            on_cpu=self.machine.kind == "cpu",
        )

    def plan_for(self, samples: Samples) -> MemoryPlan:
        """The plan for these data."""
        return self.plan(*self._passes(samples))

    def _passes(self, samples: Samples) -> tuple[PassTokens, PassTokens | None]:
        """The fullest passes of training and evaluation."""
        work = samples.fullest or self.even_pass(samples.longest, self.config.per_device_train_batch_size)
        return work, self._evaluation(samples)

    def _evaluation(self, samples: Samples) -> PassTokens | None:
        """The fullest pass over the evaluation data."""
        if samples.evaluation is not None or not samples.evaluates:
            return samples.evaluation
        return self.even_pass(samples.longest, self.config.per_device_eval_batch_size)

    def even_pass(self, length: int, batch: int) -> PassTokens:
        """The pass of a micro-batch of samples of one length, every token trained; batch.split_evenly cuts it so."""
        most = most_tokens_of(self.machine)
        groups = -(-batch // max(1, most // length))
        together = -(-batch // groups)
        return PassTokens(together * length, together * (length - 1), length)

    def longest_that_fits(self, samples: Samples) -> int:
        """Tokens of the longest sample, at the batch of the settings, in steps of 8; 0 if none fits."""
        most = min(LONGEST_TRIED, self.shape.context or LONGEST_TRIED)
        batch = self.config.per_device_train_batch_size
        return 8 * _largest(most // 8, lambda n: self._fits(self.even_pass(8 * n, batch), samples))

    def largest_batch_that_fits(self, samples: Samples) -> int:
        """Samples a micro-batch at the longest length, LARGEST_BATCH_TRIED for that many or more; 0 if none fits."""
        return _largest(LARGEST_BATCH_TRIED, lambda n: self._fits(self.even_pass(samples.longest, n), samples))

    def has_to_recompute(self, samples: Samples, batch: int, longest: int) -> bool:
        """Whether what fits at most does so only with gradient_checkpointing true, as "auto" leaves less room.

        Args:
            batch: the largest that fits, 0 for none; likewise longest.
        """
        evaluation = self._evaluation(samples)
        sizes = ((samples.longest, batch), (longest, self.config.per_device_train_batch_size))
        works = [self.even_pass(length, size) for length, size in sizes if length and size]
        return any(self.plan(work, evaluation).fits(self.machine) is False for work in works)

    def _fits(self, work: PassTokens, samples: Samples) -> bool:
        evaluation = self._evaluation(samples)
        tries = (self, replace(self, config=self.config.model_copy(update={"gradient_checkpointing": True})))
        if self.config.gradient_checkpointing != "auto":  # which leaves some room for a step's moments
            tries = tries[:1]
        return any(one.plan(work, evaluation).fits(self.machine) for one in tries)


def most_tokens_of(machine: Machine) -> int:
    """Tokens that a pass is cut to; on a GPU a micro-batch is one pass."""
    return TOKENS_PER_PASS_ON_CPU if machine.kind == "cpu" else 2**31


def training_batches(count: int, config: TrainConfig, processes: int = 1) -> list[list[int]]:
    """The numbers of the samples of each micro-batch of one process, in the first steps.

    Args:
        count: of all samples.
    """
    order = Plan(
        sample_count=count,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        processes=processes,
        seed=config.seed,
    )
    steps = range(min(order.steps_per_epoch, STEPS_TO_LOOK_AT))
    return [[int(number) for number in share] for step in steps for share in order.micro_batches(step, 0)]


def fullest_group(lengths: Sequence[int], batches: Iterable[Sequence[int]], most_tokens: int) -> list[int]:
    """The numbers of the samples that make up the pass of most tokens.

    Args:
        lengths: of the samples, in tokens.
        batches: the numbers of the samples of each micro-batch.
        most_tokens: of a pass.
    """
    found: list[int] = []
    for numbers in batches:
        sizes = sizes_of_groups([lengths[number] for number in numbers], most_tokens)
        groups = [list(numbers[end - size : end]) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        found = max(found, *groups, key=lambda group: sum(lengths[number] for number in group))
    return found


def _filled_up(work: PassTokens) -> PassTokens:
    return replace(work, tokens=-(-work.tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not; what is larger is taken to need more."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
