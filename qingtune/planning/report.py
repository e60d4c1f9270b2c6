"""What `qingtune plan` and a run at its start tell: memory by method, what fits, what would take less, and the time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qingtune.config.training import TrainConfig
from qingtune.data.order import Plan
from qingtune.machine.resources import Machine
from qingtune.output.invocation import command_line
from qingtune.output.units import counted, duration
from qingtune.planning.advice import Advice, advise
from qingtune.planning.blueprint import Blueprint
from qingtune.planning.disk import DiskPlan, plan_disk
from qingtune.planning.planner import (
    CONTEXT_ON_GPU,
    LARGEST_BATCH_TRIED,
    METHODS,
    PARTS,
    MemoryPlan,
    Planner,
    Samples,
    as_method,
    method_of,
)
from qingtune.planning.speed import Estimate, Speed, estimate_speed, flops_of

WIDTH = 80
# Columns of the table: heading, and the parts that it sums.
_COLUMNS = {
    "model": ("weights", "quantized_weights"),
    "adapt": ("adapters",),
    "grads": ("gradients",),
    "optim": ("optimizer_states",),
    "activ": ("activations",),
    "logit": ("logits",),
    "other": ("runtime", "loading"),
}
_LEGEND = (
    "GB (10^9 bytes). model: its weights; adapt: adapters and modules trained in full; grads: gradients; optim: "
    "optimizer states; activ: activations; other: the runtime, and what loading takes beyond all that. total: the "
    "peak of the run, which uses free memory to recompute less. least: the peak with every layer recomputed "
    "(gradient_checkpointing true); compare methods by it."
)


@dataclass(frozen=True)
class MethodPlan:
    """One method: its memory, the longest sample and largest micro-batch that fit, and its speed if it is known.

    `least`: bytes at the peak with every layer recomputed. `recomputing`: whether length and batch fit only so.
    `flops`: operations a token. `disk`: what it writes.
    """

    memory: MemoryPlan
    least: int
    longest: int
    batch: int
    recomputing: bool
    flops: float
    speed: Estimate | None
    disk: DiskPlan


@dataclass(frozen=True)
class Report:
    """All of the report; `chosen` is the key of the method that the settings ask for."""

    name: str
    blueprint: Blueprint
    config: TrainConfig
    machine: Machine
    samples: Samples
    chosen: str
    methods: dict[str, MethodPlan]
    advice: Sequence[Advice]
    notices: Sequence[str]

    @property
    def own(self) -> MethodPlan:
        """The plan of the method that the settings ask for."""
        return self.methods[self.chosen]

    @property
    def planned_bytes(self) -> dict[str, int]:
        """Parts and total of the peak that a run measures; a GPU's context is not among what torch counts there."""
        parts = dict(self.own.memory.parts)
        if self.machine.kind == "cuda":
            parts["runtime"] -= CONTEXT_ON_GPU
        return {**parts, "total": sum(parts.values())}


def make_report(
    name: str,
    blueprint: Blueprint,
    config: TrainConfig,
    machine: Machine,
    samples: Samples,
    speeds: Sequence[Speed],
) -> Report:
    """Plan every method that the settings leave possible.

    Args:
        name: the model's, for the user.
        speeds: what this machine was seen to do.

    Raises:
        UserError: a setting names what the model has not.
    """
    chosen = method_of(config)
    methods: dict[str, MethodPlan] = {}
    for method in METHODS:
        planner = Planner(blueprint, config if method == chosen else as_method(config, method), machine)
        if method != chosen and not planner.possible:
            continue
        memory = planner.plan_for(samples)
        flops = flops_of(planner, memory.recompute, samples)
        speed = estimate_speed(speeds, machine.name, machine.dtype, method, flops)
        longest, batch = planner.longest_that_fits(samples), planner.largest_batch_that_fits(samples)
        recomputing = planner.has_to_recompute(samples, batch, longest)
        disk = _disk(planner, memory, samples)
        least = planner.least_for(samples)
        methods[method] = MethodPlan(memory, least, longest, batch, recomputing, flops, speed, disk)
    own, notices = Planner(blueprint, config, machine), [*blueprint.notices]
    if blueprint.experts and not blueprint.reaches_experts:
        notices.append(
            "The experts of this model are one parameter a layer: they get no adapters, and QLoRA leaves them in 16 "
            "bits."
        )
    if not own.fast:
        notices.append(
            "This model is trained by the general kernels: its activations are an estimate, within a third or so."
        )
    return Report(name, blueprint, config, machine, samples, chosen, methods, advise(own, samples), notices)


def _disk(planner: Planner, memory: MemoryPlan, samples: Samples) -> DiskPlan:
    """A model is written as it was stored, adapters as they are trained."""
    trained, blueprint = memory.parts["gradients"], planner.blueprint
    result = blueprint.parameters * blueprint.stored_itemsize if planner.full else trained
    checkpoint = trained + memory.parts["optimizer_states"]
    return plan_disk(planner.config, result, checkpoint, samples.count, here=not planner.machine.supposed)


# --- Text ------------------------------------------------------------------------------------------------------------


def as_lines(report: Report) -> list[str]:
    """The whole report for people, at most 80 columns wide."""
    machine, samples, config = report.machine, report.samples, report.config
    free = "free memory unknown" if machine.free is None else f"{_gb(machine.free)} GB free"
    total = "" if machine.total is None else f" of {_gb(machine.total)}"
    count = report.blueprint.parameters
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
    lines = [
        f"Model: {report.name}, {size} parameters ({report.blueprint.model_type})",
        f"Machine: {machine.name}, {machine.dtype}; {free}{total}",
        f"Run: {counted(config.per_device_train_batch_size, 'sample')} a micro-batch, "
        f"longest sample {samples.longest:,} tokens ({samples.basis})",
        "",
        *_table(report),
        "",
        _LEGEND,
        *report.notices,
        "",
        _verdict(report),
        _room(report),
        *_advice(report.advice),
        _disk_line(report),
        _time(report),
    ]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""]]


def _table(report: Report) -> Iterator[str]:
    headings = "".join(f"{heading:>6}" for heading in (*_COLUMNS, "total", "least"))
    yield f"{'':20}{headings} fits"
    for method, plan in report.methods.items():
        memory = plan.memory
        cells = [sum(memory.parts[part] for part in parts) for parts in _COLUMNS.values()]
        numbers = "".join(f"{_gb(size) if size else '-':>6}" for size in (*cells, memory.total, plan.least))
        mark = "> " if method == report.chosen else "  "
        fits = {True: "yes", False: "no", None: "?"}[memory.fits(report.machine)]
        yield f"{mark + METHODS[method]:20}{numbers} {fits:>4}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"


def _verdict(report: Report) -> str:
    memory, free = report.own.memory, report.machine.free
    name = METHODS[report.chosen]
    name = name[0].upper() + name[1:]
    if free is None:
        return f"{name} takes {_gb(memory.total)} GB; how much is free is not known here."
    if memory.total <= free:
        verdict = f"{name} takes {_gb(memory.total)} GB and fits, with {_gb(free - memory.total)} GB to spare."
    else:
        verdict = f"{name} takes {_gb(memory.total)} GB and does not fit: {_gb(memory.total - free)} GB too much."
        swap = report.machine.free_with_swap
        if swap is not None and memory.total <= swap:
            verdict += " With swap space it may run, slowly."
    if memory.recompute:
        verdict += f" {memory.recompute} of {report.blueprint.layers} layers are recomputed in the backward pass."
    return verdict


def _room(report: Report) -> str:
    """How far it could go."""
    plan, samples = report.own, report.samples
    if report.machine.free is None or (not plan.batch and not plan.longest):
        return "No length fits." if report.machine.free is not None else ""
    batch = f"{plan.batch:,}" + " or more" * (plan.batch == LARGEST_BATCH_TRIED)
    most = ", all that the model reads" if plan.longest == report.blueprint.context else ""
    size = report.config.per_device_train_batch_size
    largest = f"samples a micro-batch at {samples.longest:,} tokens: {batch}" if plan.batch else ""
    longest = f"tokens a sample at {size} a micro-batch: {plan.longest:,}{most}" if plan.longest else ""
    how = ", with gradient_checkpointing true" * plan.recomputing
    return f"The most that fits{how}: {'; '.join(part for part in (largest, longest) if part)}."


def _advice(advice: Sequence[Advice]) -> Iterator[str]:
    if advice:
        yield "What would take less, and its price:"
    for one in advice:
        fitting = "; not enough" * (one.fits is False)
        yield f"  {one.change} saves {_gb(one.saves)} GB ({one.price}{fitting})"


def _disk_line(report: Report) -> str:
    disk, each = report.own.disk, _gb(report.own.disk.checkpoint)
    parts = f"Disk: the result {_gb(disk.result)} GB"
    if disk.checkpoints is None:
        parts += f", each checkpoint {each} GB"
    elif disk.checkpoints:
        parts += f", up to {counted(disk.checkpoints, 'checkpoint')} of {each} GB"
    if disk.free is None:
        return f"{parts}."
    if disk.fits:
        return f"{parts}; {_gb(disk.free)} GB are free."
    change = "Choose another output_dir"
    if disk.result <= disk.free:
        change += ", or have save_total_limit remove old checkpoints"
    return f"{parts}; that may not fit: {_gb(disk.free)} GB are free. {change}."


def _time(report: Report) -> str:
    speed, samples = report.own.speed, report.samples
    if speed is None and report.machine.supposed:
        return "Time: unknown, as nothing was measured there."
    if speed is None:
        return f"Time: unknown; `{command_line('plan', '--calibrate')}` measures this machine, and each run adds to it."
    rate = f"about {speed.tokens_per_second:,.0f} tokens/s, by {speed.basis}"
    if samples.count is None:
        return f"Time: {rate}; name data_path for the time of an epoch."
    epoch = samples.count * samples.mean / speed.tokens_per_second
    config = report.config
    epochs = config.num_train_epochs
    if config.max_steps > 0:
        epochs = config.max_steps / Plan.of(config, samples.count).steps_per_epoch
    return f"Time: {duration(epoch)} an epoch, {duration(epoch * epochs)} in all ({rate})."


def short_lines(report: Report) -> list[str]:
    """What a run says at its start."""
    memory, free = report.own.memory, report.machine.free
    names = {name: size for name, size in memory.parts.items() if size >= 0.005e9}
    parts = ", ".join(f"{PARTS[name]} {_gb(size)}" for name, size in names.items())
    lines = [f"Plan: {_gb(memory.total)} GB of memory at the peak ({parts})."]
    if free is not None and memory.total > free:
        helpful = [one for one in report.advice if one.fits] or list(report.advice)
        change = "; ".join(f"{one.change} saves {_gb(one.saves)} GB ({one.price})" for one in helpful[:2])
        lines.append(f"It may not fit: {_gb(free)} GB are free. {change[:1].upper()}{change[1:]}{'.' * bool(change)}")
    elif free is not None:
        lines.append(f"It fits: {_gb(free)} GB are free.")
    lines.append(_disk_line(report))
    if report.own.speed is not None:
        lines.append(_time(report))
    return lines


# --- JSON ------------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as one object; bytes, tokens, seconds."""
    machine, samples = report.machine, report.samples
    return {
        "model": {
            "name": report.name,
            "model_type": report.blueprint.model_type,
            "parameters": report.blueprint.parameters,
        },
        "machine": {
            "device": machine.name,
            "kind": machine.kind,
            "dtype": machine.dtype,
            "free_bytes": machine.free,
            "total_bytes": machine.total,
        },
        "samples": {name: getattr(samples, name) for name in ("longest", "mean", "trained_share", "count", "basis")},
        "method": report.chosen,
        **_method_json(report, report.chosen),
        "methods": {method: _method_json(report, method) for method in report.methods},
        "advice": [
            {"change": one.change, "saves_bytes": one.saves, "price": one.price, "fits": one.fits}
            for one in report.advice
        ],
        "notices": list(report.notices),
    }


def _method_json(report: Report, method: str) -> dict[str, Any]:
    plan, samples = report.methods[method], report.samples
    rate = plan.speed.tokens_per_second if plan.speed else None
    return {
        "total_bytes": plan.memory.total,
        "least_bytes": plan.least,
        "parts": plan.memory.parts,
        "fits": plan.memory.fits(report.machine),
        "disk": {
            "result_bytes": plan.disk.result,
            "checkpoint_bytes": plan.disk.checkpoint,
            "checkpoints": plan.disk.checkpoints,
            "free_bytes": plan.disk.free,
            "fits": plan.disk.fits,
        },
        "trainable_parameters": plan.memory.trainable,
        "tokens_a_pass": plan.memory.tokens,
        "layers_recomputed": plan.memory.recompute,
        "longest_sample_that_fits": plan.longest if report.machine.free is not None else None,
        "largest_batch_that_fits": plan.batch if report.machine.free is not None else None,
        "these_need_gradient_checkpointing": plan.recomputing,
        "tokens_per_second": rate,
        "seconds_per_epoch": samples.count * samples.mean / rate if rate and samples.count is not None else None,
    }
