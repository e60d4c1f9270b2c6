"""Which changes of settings take less memory, in bytes, and which of them make a run fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qingtune.memory import EIGHT_BITS
from qingtune.planning import METHODS, Planner, Samples, as_method

LEAST_SAVING = 0.02  # of the whole, below which a change is not worth a line


@dataclass(frozen=True)
class Advice:
    """A change of settings, the bytes that it saves, and whether the run fits then; None where that is unknown."""

    change: str
    saves: int
    fits: bool | None


def advise(planner: Planner, samples: Samples) -> list[Advice]:
    """Changes that take less memory, the ones that change least in the result first; where none is enough, several."""
    now = planner.plan_for(samples)
    found: list[Advice] = []
    for change in _changes(planner, samples):
        other = planner_with(planner, change.update).plan_for(change.samples)
        if now.total - other.total >= LEAST_SAVING * now.total:
            found.append(Advice(change.text, now.total - other.total, other.fits(planner.machine)))
    if now.fits(planner.machine) is False and not any(one.fits for one in found):
        found += _several(planner, samples, now.total)
    return found


def planner_with(planner: Planner, update: dict[str, Any]) -> Planner:
    """Plans of the same run with other settings."""
    return replace(planner, config=planner.config.model_copy(update=update))


@dataclass(frozen=True)
class _Change:
    """Settings in words and as values, and the data as they are then."""

    text: str
    update: dict[str, Any]
    samples: Samples

    def and_then(self, other: _Change) -> _Change:
        """Both; `other` was made with this one's data."""
        return _Change(f"{self.text}, {other.text}".strip(", "), {**self.update, **other.update}, other.samples)


def _changes(planner: Planner, samples: Samples) -> list[_Change]:
    """One at a time."""
    config = planner.config
    batch, length = config.per_device_train_batch_size, samples.longest
    changes: list[_Change] = []
    if config.gradient_checkpointing is not True:
        changes.append(_recomputing(samples))
    if batch > 1:
        changes.append(_smaller_batch(planner, samples, batch // 2))
    if config.optim not in EIGHT_BITS and planner.machine.kind != "mps":
        changes.append(_Change("optim adamw_8bit", {"optim": "adamw_8bit"}, samples))
    if not planner.full and config.lora_r > 8:
        changes.append(_Change(f"lora_r {config.lora_r // 2}", {"lora_r": config.lora_r // 2}, samples))
    if length >= 256:
        changes.append(_shorter(samples, length // 2))
    return changes + [change for change in _methods(planner, samples) if "optim" not in change.update]


def _recomputing(samples: Samples) -> _Change:
    return _Change("gradient_checkpointing true", {"gradient_checkpointing": True}, samples)


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
    )


def _shorter(samples: Samples, length: int) -> _Change:
    shorter = replace(samples, longest=length, fullest=None, evaluation=None)
    return _Change(f"max_seq_length {length}", {"max_seq_length": length}, shorter)


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
        names = ("optim",) if method == "full8" else ("use_lora", "use_qlora", "quantization_bit")
        changes.append(_Change(texts[method], {name: getattr(other, name) for name in names}, samples))
    return changes


def _several(planner: Planner, samples: Samples, now: int) -> list[Advice]:
    """Changes that fit together: of the batch and of what is kept, which leave the result as it is, by each method in
    turn; then of the length too. Nothing if even that is not enough.

    Args:
        now: bytes of the run as it is.
    """
    batch = planner.config.per_device_train_batch_size
    sizes = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
    batches = [_smaller_batch(planner, samples, size) for size in sizes]
    methods = [_Change("", {}, samples), *_methods(planner, samples)]
    tried = [smaller for method in methods for smaller in (method, *(method.and_then(change) for change in batches))]
    if planner.config.gradient_checkpointing is not True:
        tried = [one for change in tried for one in (change, change.and_then(_recomputing(change.samples)))]
    for change in tried:
        plan = planner_with(planner, change.update).plan_for(change.samples)
        if plan.fits(planner.machine):
            return [Advice(change.text, now - plan.total, True)]
    least = planner_with(planner, tried[-1].update)
    longest = least.longest_that_fits(replace(tried[-1].samples, evaluates=False, evaluation=None))
    change = tried[-1].and_then(_shorter(tried[-1].samples, longest))
    if not longest:
        return []
    plan = planner_with(planner, change.update).plan_for(change.samples)
    return [Advice(change.text, now - plan.total, plan.fits(planner.machine))]
