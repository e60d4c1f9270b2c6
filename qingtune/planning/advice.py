"""Which changes of settings take less memory, in bytes, at what price, and which of them make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.planning.planner import METHODS, SETTINGS, Planner, Samples, method_of
from qingtune.planning.speed import flops_of

LEAST_SAVING = 0.02  # of the whole, below which a change is not worth a line
# What a method's memory is paid with.
_PRICES = {
    "full8": "optimizer states in 8 bits",
    "lora": "adapters are trained, not the weights",
    "qlora8": "weights rounded to 8 bits",
    "qlora4": "weights rounded to 4 bits",
}


@dataclass(frozen=True)
class Advice:
    """A change of settings, the bytes it saves, its price, and whether the run then fits; None where unknown."""

    change: str
    saves: int
    price: str
    fits: bool | None


@dataclass(frozen=True)
class _Change:
    """New values of settings, the data as they are then, and what the change costs."""

    update: dict[str, Any]
    samples: Samples
    price: str

    def __str__(self) -> str:
        settings = self.update.items()
        return ", ".join(name if name.startswith("use_") else f"{name} {value}".lower() for name, value in settings)

    def and_then(self, other: _Change) -> _Change:
        """Both; `other` was made with this one's data."""
        return _Change({**self.update, **other.update}, other.samples, f"{self.price}, {other.price}".strip(", "))


def advise(planner: Planner, samples: Samples) -> list[Advice]:
    """Changes that take less memory, the ones that change least in the result first; where none is enough, several."""
    now = planner.plan_for(samples)
    found = [_advice(planner, samples, change) for change in _changes(planner, samples)]
    found = [one for one in found if one.saves >= LEAST_SAVING * now.total]
    if now.fits(planner.machine) is False and not any(one.fits for one in found):
        found += _several(planner, samples)
    return found


def _advice(planner: Planner, samples: Samples, change: _Change) -> Advice:
    """What a change saves, also where "auto" fills it again to recompute less."""
    other = _with(planner, change.update)
    then = other.plan_for(change.samples)
    saves = planner.plan_for(samples).total - then.total
    if planner.config.gradient_checkpointing == "auto":
        saves = max(saves, planner.least_for(samples) - other.least_for(change.samples))
    return Advice(str(change), saves, change.price, then.fits(planner.machine))


def _with(planner: Planner, update: dict[str, Any]) -> Planner:
    """Plans of the same run with other settings."""
    return replace(planner, config=planner.config.model_copy(update=update))


def _changes(planner: Planner, samples: Samples) -> Iterator[_Change]:
    """One at a time."""
    config = planner.config
    batch, length = config.per_device_train_batch_size, samples.longest
    if config.gradient_checkpointing is False or (config.gradient_checkpointing == "auto" and not planner.fast):
        yield _recomputing(planner, samples)  # on the fast kernels "auto" recomputes what it has to by itself
    if batch > 1:
        yield _smaller_batch(planner, samples, batch // 2)
    if config.optim not in EIGHT_BITS and planner.machine.kind != "mps":
        yield _Change({"optim": "adamw_8bit"}, samples, _PRICES["full8"])
    if not planner.full and config.lora_r > 8:
        yield _Change({"lora_r": config.lora_r // 2}, samples, "half the trained parameters")
    if length >= 256 and _leaves_some(planner, samples, length // 2):
        yield _shorter(planner, samples, length // 2)
    yield from (change for change in _methods(planner, samples) if "optim" not in change.update)


def _recomputing(planner: Planner, samples: Samples) -> _Change:
    update: dict[str, Any] = {"gradient_checkpointing": True}
    now, then = (flops_of(one, one.plan_for(samples).recompute, samples) for one in (planner, _with(planner, update)))
    return _Change(update, samples, f"{then / now:.2f} x the work")


def _smaller_batch(planner: Planner, samples: Samples, size: int) -> _Change:
    """A micro-batch of that many; the result stays the same as more of them are accumulated."""
    config = planner.config
    accumulation = config.gradient_accumulation_steps * (config.per_device_train_batch_size // size)
    if samples.fullest is not None and planner.machine.kind != "cpu":  # there passes are cut by their tokens
        share = size / config.per_device_train_batch_size
        tokens, predicting = (round(share * n) for n in (samples.fullest.tokens, samples.fullest.predicting))
        samples = replace(samples, fullest=replace(samples.fullest, tokens=tokens, predicting=predicting))
    update = {"per_device_train_batch_size": size}
    if not config.samples_per_step:
        update["gradient_accumulation_steps"] = accumulation
    return _Change(update, samples, "the same result")


def _leaves_some(planner: Planner, samples: Samples, length: int) -> bool:
    """Whether there are samples to train on where none may be longer than this."""
    lengths = samples.lengths
    return planner.config.on_long == "truncate" or not lengths or min(lengths) <= length


def _shorter(planner: Planner, samples: Samples, length: int) -> _Change:
    shorter = replace(samples, longest=length, fullest=None, evaluation=None)
    longer = sum(one > length for one in samples.lengths)
    rows = f"{longer:,} of {len(samples.lengths):,} samples" if samples.lengths else "longer samples"
    fate = {"drop": "drops", "truncate": "cuts", "raise": "refuses"}[planner.config.on_long]
    return _Change({"max_seq_length": length}, shorter, f"{fate} {rows}")


def _methods(planner: Planner, samples: Samples) -> list[_Change]:
    """Those that take less than the one of the settings, which keeps its other settings."""
    order, config = list(METHODS), planner.config
    changes: list[_Change] = []
    for method in order[order.index(method_of(config)) + 1 :]:
        update = {name: value for name, value in SETTINGS[method].items() if getattr(config, name) is not True}
        changes.append(_Change(update, samples, _PRICES[method]))
    return [change for change in changes if _with(planner, change.update).possible]


def _several(planner: Planner, samples: Samples) -> list[Advice]:
    """Changes that fit together: of the batch and of what is kept, which leave the result as it is, by each method in
    turn; then of the length too. Nothing if even that is not enough.
    """
    batch = planner.config.per_device_train_batch_size
    sizes = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
    batches = [_smaller_batch(planner, samples, size) for size in sizes]
    methods = [_Change({}, samples, ""), *_methods(planner, samples)]
    tried = [smaller for method in methods for smaller in (method, *(method.and_then(change) for change in batches))]
    if planner.config.gradient_checkpointing is not True:
        recomputing = [_recomputing(_with(planner, change.update), change.samples) for change in tried]
        pairs = zip(tried, recomputing, strict=True)
        tried = [one for change, again in pairs for one in (change, change.and_then(again))]
    given = (_advice(planner, samples, change) for change in tried)
    if enough := next((one for one in given if one.fits), None):
        return [enough]
    last = tried[-1]
    least = _with(planner, last.update)
    longest = least.longest_that_fits(replace(last.samples, evaluates=False, evaluation=None))
    if not longest or not _leaves_some(planner, samples, longest):
        return []
    return [_advice(planner, samples, last.and_then(_shorter(planner, last.samples, longest)))]
