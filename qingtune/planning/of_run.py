"""The plan of a run with known data, and its comparison with the run at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from qingtune.config.training import TrainConfig
from qingtune.data.batch import collate, shared_beginnings
from qingtune.data.prepare import Data
from qingtune.data.tokenize import Sample
from qingtune.kernels.device import Hardware, free_bytes
from qingtune.kernels.footprint import PassTokens
from qingtune.kernels.layout import fill_up, lay_out
from qingtune.machine.resources import Machine, cpu_multiplies_int8, cpu_name, free_ram_bytes
from qingtune.models.find import cache_folder
from qingtune.output.console import say
from qingtune.planning.blueprint import read_blueprint
from qingtune.planning.planner import Planner, Samples, fullest_group, most_tokens_of, training_batches
from qingtune.planning.report import Report, make_report
from qingtune.planning.speed import Speed, keep_speed, read_speeds
from qingtune.runs.measures import after_warm_up
from qingtune.runs.page.source import read_curves

# A rate is kept if it rests on at least so much, beyond the first logged line, which holds the warm-up.
LEAST_SECONDS, LEAST_STEPS = 2.0, 5


def plan_run(config: TrainConfig, folder: Path, hardware: Hardware, data: Data, processes: int) -> Report:
    """The plan, by the samples themselves.

    Args:
        folder: of the model.
        processes: of the run; each has its share of the data.

    Raises:
        UserError: the model's shape is not known to planning, or a setting names what the model has not.
    """
    blueprint = read_blueprint(folder)
    machine, cache = machine_of(hardware), cache_folder(config.cache_dir)
    samples = _samples(Planner(blueprint, config, machine), data, processes)
    return make_report(config.model_name_or_path, blueprint, config, machine, samples, read_speeds(cache))


def machine_of(hardware: Hardware) -> Machine:
    """The hardware that a run chose, as planning takes it; what this process holds already counts as free."""
    kind: Any = hardware.device.type
    itemsize, free = hardware.dtype.itemsize, free_bytes(hardware.device)
    if kind == "cpu":
        taken = psutil.Process().memory_info().rss
        swap = free_ram_bytes(swap=True) + taken
        total = psutil.virtual_memory().total
        return Machine("cpu", cpu_name(), itemsize, (free or 0) + taken, total, swap, cpu_multiplies_int8())
    name = hardware.reason.partition(",")[0].removeprefix("GPU ")
    return Machine(kind, name, itemsize, free, None)


def _samples(planner: Planner, data: Data, processes: int) -> Samples:
    config = planner.config
    lengths = [len(sample.token_ids) for sample in data.train]
    trained = sum(sample.trained_tokens for sample in data.train)
    most_tokens = most_tokens_of(planner.machine)
    loss_shares = planner.shares(max(len(sample.token_ids) for sample in [*data.train, *data.evaluation]))
    shares = loss_shares and (planner.full or not config.lora_dropout)
    evaluation = None
    if data.evaluation:
        size, numbers = config.per_device_eval_batch_size, range(len(data.evaluation))
        batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        evaluation = _fullest(data.evaluation, batches, most_tokens, shares=loss_shares)
    return Samples(
        longest=max(lengths),
        mean=sum(lengths) / len(lengths),
        trained_share=trained / sum(lengths),
        count=-(-len(lengths) // processes),
        evaluates=bool(data.evaluation),
        basis="the samples themselves",
        lengths=tuple(lengths),
        fullest=_fullest(data.train, training_batches(len(lengths), config, processes), most_tokens, shares=shares),
        evaluation=evaluation,
    )


def _fullest(
    samples: Sequence[Sample], batches: Iterable[Sequence[int]], most_tokens: int, *, shares: bool
) -> PassTokens:
    """The fullest pass, as the decoder lays it out; shares: whether a common beginning is held once."""

    def shared(numbers: Sequence[int]) -> list[int]:
        return shared_beginnings([samples[number] for number in numbers])

    lengths = [len(sample.token_ids) for sample in samples]
    group = fullest_group(lengths, batches, most_tokens, shared if shares else None)
    layout = fill_up(lay_out(collate([samples[number] for number in group]), share_prefix=shares))
    longest = max(segment.end - segment.start for segment in layout.segments)
    return PassTokens(len(layout.token_ids), len(layout.targets), longest)


def keep_measured_speed(report: Report, metrics: Path) -> None:
    """Keep a run's tokens a second for later plans, by its logged lines; a full disk keeps no run from its end."""
    rate = measured_speed(metrics)
    if rate is None:
        return
    speed = Speed(report.machine.name, report.machine.dtype, report.chosen, report.own.flops, rate)
    try:
        keep_speed(cache_folder(report.config.cache_dir), speed)
    except OSError as error:
        say(f"The speed of this run is not kept for later plans: {error.strerror}.")


def measured_speed(metrics: Path) -> float | None:
    """Tokens a second after the warm-up, from a run's metrics.jsonl; None where it was too short to tell."""
    curves = read_curves(metrics)
    too_few = len(curves.steps) == 1 and curves.steps[0] < LEAST_STEPS
    if too_few or sum(after_warm_up(curves.values["seconds"])) < LEAST_SECONDS:
        return None
    return curves.tokens_per_second
