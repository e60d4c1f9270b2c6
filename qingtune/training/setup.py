"""Configuration, model and data -> what the training loop needs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qingtune.config.training import TrainConfig
from qingtune.data.batch import Batch, collate, split_evenly
from qingtune.data.order import Plan
from qingtune.data.prepare import Data
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError, is_out_of_memory
from qingtune.kernels.device import Hardware, peak_bytes
from qingtune.kernels.footprint import optimizer_bytes
from qingtune.output.console import say
from qingtune.runs.record import versions
from qingtune.training.checkpoint import load_checkpoint, parse_state, prune, save_checkpoint
from qingtune.training.engine import Engine, make_engine
from qingtune.training.loop import Limits, Processes, Progress, Work
from qingtune.training.optim import make_optimizer, make_schedule, warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trained:
    """What a run trains, by name, and what updates it."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def make_trained(config: TrainConfig, model: PreTrainedModel, hardware: Hardware) -> Trained:
    """The trained parameters of a model with a new optimizer and a new loss scale."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, notice = make_optimizer(config, parameters.items(), hardware.device)
    if notice:
        say(notice)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    return Trained(parameters, optimizer, scaler)


def resume(trained: Trained, checkpoint: Path | None) -> Progress:
    """Load a checkpoint into what is trained.

    Args:
        checkpoint: of a run with the same settings; None leaves all at its start.

    Returns:
        where the run stands.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    if checkpoint is None:
        return Progress()
    load_checkpoint(checkpoint, trained.parameters, trained.optimizer, trained.scaler)
    return parse_state(checkpoint).progress


def make_work(
    config: TrainConfig,
    model: PreTrainedModel,
    trained: Trained,
    data: Data,
    hardware: Hardware,
    processes: Processes,
    settings: dict[str, Any],
) -> Work:
    """What the loop calls: gradients, batches, updates, evaluations and checkpoints.

    Args:
        settings: kept in each checkpoint, so that a later run can tell whether it may resume.

    Raises:
        UserError: there is no memory for the longest sample.
    """
    assert config.learning_rate is not None
    device = hardware.device
    longest = max(len(sample.token_ids) for sample in [*data.train, *data.evaluation])
    engine = make_engine(config, model, hardware, longest, evaluates=bool(data.evaluation))
    plan = _order(config, len(data.train), processes.count)
    total = _limits(config, plan).total_steps
    model.train()
    return Work(
        parameters=list(trained.parameters.values()),
        add_gradients=engine.add_gradients,
        fetch=_fetcher(data.train, plan, device, processes, engine),
        shrink=engine.shrink,
        optimizer=trained.optimizer,
        learning_rate=make_schedule(config.lr_scheduler_type, config.learning_rate, warmup_steps(config, total), total),
        evaluate=_evaluator(data.evaluation, config.per_device_eval_batch_size, model, device, processes, engine),
        save=_saver(config, trained, settings, processes),
        peak_bytes=lambda: peak_bytes(device),
        scaler=trained.scaler,
    )


def say_length(config: TrainConfig, samples: int, processes: int) -> None:
    """Report how long the run is and how it learns."""
    plan = _order(config, samples, processes)
    total = _limits(config, plan).total_steps
    if (warmup := warmup_steps(config, total)) >= total:
        say(f"Warning: the warm-up takes {warmup:,} steps of {total:,}, so the learning rate never reaches its peak.")
    say(
        f"Training: {total:,} steps of {plan.window_size} samples ({total / plan.steps_per_epoch:.3g} epochs), "
        f"{config.optim}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}."
    )


def check_room(config: TrainConfig, trained: Sequence[torch.nn.Parameter], limits: Limits) -> None:
    """Look at the disk before hours of work.

    Raises:
        UserError: it does not even take the result.
    """
    result = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    checkpoint = result + optimizer_bytes(config.optim, sum(parameter.numel() for parameter in trained))
    count = limits.total_steps // limits.save_every if limits.save_every else 0
    if config.save_total_limit:
        count = min(count, config.save_total_limit + 2)  # the best one, and the next one before an old one goes
    free = shutil.disk_usage(config.output_dir).free
    if free < result:
        raise UserError(
            f"the disk has {free / 1e9:.2f} GB left, and the result needs about {result / 1e9:.2f} GB",
            where=config.output_dir,
            fix="Free disk space, or choose an output_dir on another disk.",
        )
    if free < result + count * checkpoint:
        say(
            f"Warning: the disk has {free / 1e9:.2f} GB left; {count} checkpoints of about {checkpoint / 1e9:.2f} GB "
            "and the result need more. save_total_limit removes old ones."
        )


def _saver(
    config: TrainConfig, trained: Trained, settings: dict[str, Any], processes: Processes
) -> Callable[[Progress], None]:
    """Writes a checkpoint, from one process, and removes those that are too many."""
    output_dir = Path(config.output_dir)

    def save(now: Progress) -> None:
        try:
            if processes.index == 0:
                save_checkpoint(
                    output_dir, trained.parameters, trained.optimizer, now, settings, versions(), trained.scaler
                )
                prune(output_dir, config.save_total_limit, now)
        finally:
            processes.wait()

    return save


def limits_of(config: TrainConfig, samples: int, processes: int) -> Limits:
    """When things happen in a run over so many samples."""
    return _limits(config, _order(config, samples, processes))


def _order(config: TrainConfig, samples: int, processes: int) -> Plan:
    return Plan(
        sample_count=samples,
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        processes=processes,
        seed=config.seed,
    )


def _limits(config: TrainConfig, plan: Plan) -> Limits:
    by_epochs = math.ceil(config.num_train_epochs * plan.steps_per_epoch)

    def every(strategy: str | None, steps: int | None) -> int | None:
        return {"steps": steps, "epoch": plan.steps_per_epoch}.get(strategy or "no")

    return Limits(
        total_steps=config.max_steps if config.max_steps > 0 else by_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        evaluate_every=every(config.eval_strategy, config.eval_steps),
        save_every=every(config.save_strategy, config.save_steps),
        save_best=config.load_best_model_at_end,
    )


def _fetcher(
    samples: list[Sample], plan: Plan, device: torch.device, processes: Processes, engine: Engine
) -> Callable[[int], list[Batch]]:
    """A function that gives this process's micro-batches of a step, as large as the engine takes at a time."""

    def fetch(step: int) -> list[Batch]:
        return [
            collate(group).to(device)
            for share in plan.micro_batches(step, processes.index)
            for group in split_evenly([samples[i] for i in share], engine.most_tokens)
        ]

    return fetch


def _evaluator(
    samples: list[Sample],
    batch_size: int,
    model: PreTrainedModel,
    device: torch.device,
    processes: Processes,
    engine: Engine,
) -> Callable[[], tuple[float, int]]:
    """A function that gives the mean loss over the trained tokens of the evaluation data, and their number."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no fp64

    def evaluate() -> tuple[float, int]:
        model.eval()
        sums = torch.zeros(2, dtype=dtype)
        for samples_of_batch in batches[processes.index :: processes.count]:
            sums += torch.tensor(_sums_within_memory(samples_of_batch, engine, device), dtype=dtype)
        model.train()
        total, tokens = processes.sum(sums).tolist()
        return total / tokens, int(tokens)

    return evaluate


def _sums_within_memory(samples: list[Sample], engine: Engine, device: torch.device) -> tuple[float, int]:
    """The summed loss and the trained tokens of samples, in smaller passes when memory runs out."""
    while True:
        batches = [collate(group).to(device) for group in split_evenly(samples, engine.most_tokens)]
        try:
            return sum(float(engine.loss(batch)) for batch in batches), sum(len(batch.targets) for batch in batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        say(engine.shrink(max(batches, key=lambda batch: len(batch.token_ids))))
