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
    """Changes that take less memory, the ones that change least in the result first."""
    now = planner.plan_for(samples)
    found: list[Advice] = []
    for change, update, fewer in _changes(planner, samples):
        config = planner.config.model_copy(update=update)
        other = Planner(planner.shape, config, planner.machine).plan_for(fewer)
        if now.total - other.total >= LEAST_SAVING * now.total:
            found.append(Advice(change, now.total - other.total, other.fits(planner.machine)))
    return found


def _changes(planner: Planner, samples: Samples) -> list[tuple[str, dict[str, Any], Samples]]:
    """Descriptions, settings, and the data as they are then."""
    config = planner.config
    batch, length = config.per_device_train_batch_size, samples.longest
    shorter = replace(samples, longest=length // 2, fullest=None)
    changes: list[tuple[str, dict[str, Any], Samples]] = []
    if config.gradient_checkpointing is not True:
        changes.append(("gradient_checkpointing true", {"gradient_checkpointing": True}, samples))
    halved = samples
    if samples.fullest is not None:  # on a CPU passes are cut by their tokens, whatever the batch
        fewer = replace(samples.fullest, tokens=samples.fullest.tokens // 2, predicting=samples.fullest.predicting // 2)
        halved = samples if planner.machine.kind == "cpu" else replace(samples, fullest=fewer)
    if batch > 1:
        accumulation = 2 * config.gradient_accumulation_steps
        update = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": accumulation}
        text = f"per_device_train_batch_size {batch // 2}, gradient_accumulation_steps {accumulation}"
        changes.append((text, update, halved))
    if config.optim not in EIGHT_BITS and planner.machine.kind != "mps":
        changes.append(("optim adamw_8bit", {"optim": "adamw_8bit"}, samples))
    if not planner.full and config.lora_r > 8:
        changes.append((f"lora_r {config.lora_r // 2}", {"lora_r": config.lora_r // 2}, samples))
    if length >= 256:
        changes.append((f"max_seq_length {length // 2}", {"max_seq_length": length // 2}, shorter))
    order = list(METHODS)
    for method, text in (("lora", "use_lora"), ("qlora8", "use_qlora, quantization_bit 8"), ("qlora4", "use_qlora")):
        if order.index(method) > order.index(planner.method):
            other = as_method(config, method)
            update = {name: getattr(other, name) for name in ("use_lora", "use_qlora", "quantization_bit", "optim")}
            changes.append((text, update, samples))
    return changes
