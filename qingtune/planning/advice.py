"""Which changes of settings take less memory, in bytes, at what price, and which of them make a run fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.planning.planner import METHODS, Planner, Samples, as_method
from qingtune.planning.speed import flops_of

LEAST_SAVING = 0.02  # of the whole, below which a change is not worth a line


@dataclass(frozen=True)
class Advice:
    """A change of settings, the bytes it saves, its price, and whether the run then fits; None where unknown."""

    change: str
    saves: int
    price: str
    fits: bool | None


def advise(planner: Planner, samples: Samples) -> list[Advice]:
    """Changes that take less memory, the ones that change least in the result first; where none is enough, several."""
    now = planner.plan_for(samples)
    found: list[Advice] = []
    for change in _changes(planner, samples):
        other = planner_with(planner, change.update)
        saves = _saving((planner, samples), (other, change.samples))
        if saves >= LEAST_SAVING * now.total:
            fits = other.plan_for(change.samples).fits(planner.machine)
            found.append(Advice(change.text, saves, change.price, fits))
    if now.fits(planner.machine) is False and not any(one.fits for one in found):
        found += _several(planner, samples)
    return found


def _saving(now: tuple[Planner, Samples], then: tuple[Planner, Samples]) -> int:
    """Bytes that a change frees, also where "auto" fills them again to recompute less."""
    (planner, samples), (other, other_samples) = now, then
    peak = planner.plan_for(samples).total - other.plan_for(other_samples).total
    if planner.config.gradient_checkpointing != "auto":
        return peak
    return max(peak, planner.least_for(samples) - other.least_for(other_samples))


def planner_with(planner: Planner, update: dict[str, Any]) -> Planner:
    """Plans of the same run with other settings."""
    return replace(planner, config=planner.config.model_copy(update=update))


@dataclass(frozen=True)
class _Change:
    """Settings in words and as values, the data as they are then, and what the change costs."""

    text: str
    update: dict[str, Any]
    samples: Samples
    price: str

    def and_then(self, other: _Change) -> _Change:
        """Both; `other` was made with this one's data."""
        text, price = f"{self.text}, {other.text}".strip(", "), f"{self.price}, {other.price}".strip(", ")
        return _Change(text, {**self.update, **other.update}, other.samples, price)


def _changes(planner: Planner, samples: Samples) -> list[_Change]:
    """One at a time."""
    config = planner.config
    batch, length = config.per_device_train_batch_size, samples.longest
    changes: list[_Change] = []
    if config.gradient_checkpointing is False or not planner.fast:  # "auto" recomputes what it has to by itself
        changes += [_recomputing(planner, samples)] * (config.gradient_checkpointing is not True)
    if batch > 1:
        changes.append(_smaller_batch(planner, samples, batch // 2))
    if config.optim not in EIGHT_BITS and planner.machine.kind != "mps":
        changes.append(_Change("optim adamw_8bit", {"optim": "adamw_8bit"}, samples, _PRICES["full8"]))
    if not planner.full and config.lora_r > 8:
        rank = config.lora_r // 2
        changes.append(_Change(f"lora_r {rank}", {"lora_r": rank}, samples, "half the trained parameters"))
    if length >= 256 and _leaves_some(planner, samples, length // 2):
        changes.append(_shorter(planner, samples, length // 2))
    return changes + [change for change in _methods(planner, samples) if "optim" not in change.update]


# What a method's memory is paid with.
_PRICES = {
    "full8": "optimizer states in 8 bits",
    "lora": "adapters are trained, not the weights",
    "qlora8": "weights rounded to 8 bits",
    "qlora4": "weights rounded to 4 bits",
}


def _recomputing(planner: Planner, samples: Samples) -> _Change:
    update: dict[str, Any] = {"gradient_checkpointing": True}
    now, then = (
        flops_of(one, one.plan_for(samples).recompute, samples) for one in (planner, planner_with(planner, update))
    )
    return _Change("gradient_checkpointing true", update, samples, f"{then / now:.2f} x the work")


def _smaller_batch(planner: Planner, samples: Samples, size: int) -> _Change:
    """A micro-batch of that many; the result stays the same as more of them are accumulated."""
    config = planner.config
    accumulation = config.gradient_accumulation_steps * (config.per_device_train_batch_size // size)
    if samples.fullest is not None and planner.machine.kind != "cpu":  # there passes are cut by their tokens
        share = size / config.per_device_train_batch_size
        tokens, predicting = (round(share * n) for n in (samples.fullest.tokens, samples.fullest.predicting))
        samples = replace(samples, fullest=replace(samples.fullest, tokens=tokens, predicting=predicting))
    return _Change(
        f"per_device_train_batch_size {size}, gradient_accumulation_steps {accumulation}",
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation},
        samples,
        "the same result",
    )


def _leaves_some(planner: Planner, samples: Samples, length: int) -> bool:
    """Whether there are samples to train on where none may be longer than this."""
    lengths = samples.lengths
    return planner.config.on_long == "truncate" or not lengths or min(lengths) <= length


def _shorter(planner: Planner, samples: Samples, length: int) -> _Change:
    shorter = replace(samples, longest=length, fullest=None, evaluation=None)
    longer = sum(one > length for one in samples.lengths)
    rows = f"{longer:,} of {len(samples.lengths):,} samples" if samples.lengths else "longer samples"
    fate = {"drop": "drops", "truncate": "cuts", "raise": "refuses"}[planner.config.on_long]
    return _Change(f"max_seq_length {length}", {"max_seq_length": length}, shorter, f"{fate} {rows}")


def _methods(planner: Planner, samples: Samples) -> list[_Change]:
    """Those that take less than the one of the settings, which keeps its other settings."""
    order, own = list(METHODS), planner.method
    bits = "" if own.startswith("qlora") else "use_qlora, "
    texts = {
        "full8": "optim adamw_8bit",
        "lora": "use_lora",
        "qlora8": f"{bits}quantization_bit 8",
        "qlora4": f"{bits}quantization_bit 4",
    }
    changes: list[_Change] = []
    for method in order[order.index(own) + 1 :]:
        other = as_method(planner.config, method)
        if not replace(planner, config=other).possible:
            continue
        names = ("optim",) if method == "full8" else ("use_lora", "use_qlora", "quantization_bit")
        update = {name: getattr(other, name) for name in names}
        changes.append(_Change(texts[method], update, samples, _PRICES[method]))
    return changes


def _several(planner: Planner, samples: Samples) -> list[Advice]:
    """Changes that fit together: of the batch and of what is kept, which leave the result as it is, by each method in
    turn; then of the length too. Nothing if even that is not enough.
    """
    batch = planner.config.per_device_train_batch_size
    sizes = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
    batches = [_smaller_batch(planner, samples, size) for size in sizes]
    methods = [_Change("", {}, samples, ""), *_methods(planner, samples)]
    tried = [smaller for method in methods for smaller in (method, *(method.and_then(change) for change in batches))]
    if planner.config.gradient_checkpointing is not True:
        recomputing = [_recomputing(planner_with(planner, change.update), change.samples) for change in tried]
        pairs = zip(tried, recomputing, strict=True)
        tried = [one for change, again in pairs for one in (change, change.and_then(again))]
    for change in tried:
        then = planner_with(planner, change.update)
        if then.plan_for(change.samples).fits(planner.machine):
            return [Advice(change.text, _saving((planner, samples), (then, change.samples)), change.price, True)]
    least = planner_with(planner, tried[-1].update)
    longest = least.longest_that_fits(replace(tried[-1].samples, evaluates=False, evaluation=None))
    if not longest or not _leaves_some(planner, samples, longest):
        return []
    change = tried[-1].and_then(_shorter(planner, tried[-1].samples, longest))
    then = planner_with(planner, change.update)
    saves = _saving((planner, samples), (then, change.samples))
    return [Advice(change.text, saves, change.price, then.plan_for(change.samples).fits(planner.machine))]
