"""Configuration, model and data -> what the training loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qingtune.config.training import TrainConfig
from qingtune.data.batch import Batch, collate, split_evenly
from qingtune.data.order import Plan
from qingtune.data.prepare import Data
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError, is_out_of_memory
from qingtune.kernels.device import Hardware, peak_bytes
from qingtune.output.console import say
from qingtune.output.units import counted
from qingtune.planning.disk import free_on_disk, most_checkpoints
from qingtune.runs.record import versions, without_secrets
from qingtune.training.checkpoint import load_checkpoint, parse_state, prune, save_checkpoint
from qingtune.training.engine import Engine, make_engine, trained_bytes
from qingtune.training.loop import Limits, Progress, Work
from qingtune.training.optim import make_optimizer, make_schedule, warmup_steps
from qingtune.training.processes import Processes
from qingtune.training.resume import Start

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_up(
    config: TrainConfig,
    model: PreTrainedModel,
    data: Data,
    hardware: Hardware,
    start: Start,
    processes: Processes,
    result_bytes: int,
) -> tuple[Work, Limits, Progress]:
    """What the loop works with, when things happen, and the progress of the run; reports its length.

    result_bytes: of the result on disk.

    Raises:
        UserError: in one of the processes there is no memory for the longest sample, or the checkpoint cannot be
            loaded; or the disk does not even take the result. All processes end then.
    """
    plan = Plan.of(config, len(data.train), processes.count)
    limits = limits_of(config, plan)
    work, progress = processes.by_all(lambda: _make_work(config, model, data, hardware, start, processes, plan))
    processes.by_first(lambda: _check_room(config, work.parameters, limits, result_bytes))
    if (warmup := warmup_steps(config, limits.total_steps)) >= limits.total_steps:
        say(
            f"Warning: the warm-up takes {counted(warmup, 'step')} of {limits.total_steps:,}, so the learning rate "
            "never reaches its peak."
        )
    say(
        f"Training: {counted(limits.total_steps, 'step')} of {counted(plan.window_size, 'sample')} "
        f"({counted(limits.total_steps / plan.steps_per_epoch, 'epoch', '.3g')}), "
        f"{config.optim}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}."
    )
    return work, limits, progress


def limits_of(config: TrainConfig, plan: Plan) -> Limits:
    """When things happen in a run that sees its samples in this order."""

    def every(strategy: str | None, steps: int | None) -> int | None:
        return {"steps": steps, "epoch": plan.steps_per_epoch}.get(strategy or "no")

    by_epochs = math.ceil(config.num_train_epochs * plan.steps_per_epoch)
    return Limits(
        total_steps=config.max_steps if config.max_steps > 0 else by_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        evaluate_every=every(config.eval_strategy, config.eval_steps),
        save_every=every(config.save_strategy, config.save_steps),
        save_best=config.load_best_model_at_end,
    )


def _make_work(
    config: TrainConfig,
    model: PreTrainedModel,
    data: Data,
    hardware: Hardware,
    start: Start,
    processes: Processes,
    plan: Plan,
) -> tuple[Work, Progress]:
    assert config.learning_rate is not None
    device, output_dir, settings = hardware.device, Path(config.output_dir), without_secrets(start.settings)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, notice = make_optimizer(config, trained.items(), device)
    if notice:
        say(notice)
    scaler = torch.amp.GradScaler(device.type, enabled=hardware.dtype == torch.float16)
    longest = max(len(sample.token_ids) for sample in [*data.train, *data.evaluation])
    engine = make_engine(config, model, hardware, longest, evaluates=bool(data.evaluation))
    total = limits_of(config, plan).total_steps

    def fetch(step: int) -> list[Batch]:
        """This process's micro-batches of a step, as large as the engine takes at a time."""
        return [
            collate(group, shares=engine.shares).to(device)
            for share in plan.micro_batches(step, processes.index)
            for group in split_evenly([data.train[i] for i in share], engine.most_tokens, shares=engine.shares)
        ]

    def save(now: Progress) -> None:
        """Write a checkpoint, from one process, and remove those that are too many."""
        try:
            if processes.index == 0:
                save_checkpoint(output_dir, trained, optimizer, now, settings, versions(), scaler)
                prune(output_dir, config.save_total_limit, now)
        finally:
            processes.wait()

    progress = Progress()
    if start.checkpoint:
        load_checkpoint(start.checkpoint, trained, optimizer, scaler)
        progress = parse_state(start.checkpoint).progress
    model.train()
    work = Work(
        parameters=list(trained.values()),
        add_gradients=engine.add_gradients,
        fetch=fetch,
        shrink=engine.shrink,
        optimizer=optimizer,
        learning_rate=make_schedule(config.lr_scheduler_type, config.learning_rate, warmup_steps(config, total), total),
        evaluate=_evaluator(data.evaluation, config.per_device_eval_batch_size, model, device, processes, engine),
        save=save,
        peak_bytes=lambda: peak_bytes(device),
        scaler=scaler,
    )
    return work, progress


def _check_room(config: TrainConfig, trained: Sequence[torch.nn.Parameter], limits: Limits, result: int) -> None:
    """Look at the disk before hours of work."""
    checkpoint = sum(trained_bytes(config, trained))
    count = most_checkpoints(config, limits.total_steps, limits.steps_per_epoch) or 0
    free = free_on_disk(Path(config.output_dir))
    if free < result:
        raise UserError(
            f"the disk has {free / 1e9:.2f} GB left, and the result needs about {result / 1e9:.2f} GB",
            where=config.output_dir,
            fix="Free disk space, or choose an output_dir on another disk.",
        )
    if free < result + count * checkpoint:
        say(
            f"Warning: the disk has {free / 1e9:.2f} GB left; {counted(count, 'checkpoint')} of about "
            f"{checkpoint / 1e9:.2f} GB and the result need more. save_total_limit removes old ones."
        )


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
        groups = split_evenly(samples, engine.most_tokens, shares=engine.loss_shares)
        batches = [collate(group, shares=engine.loss_shares).to(device) for group in groups]
        try:
            return sum(float(engine.loss(batch)) for batch in batches), sum(len(batch.targets) for batch in batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        say(engine.shrink(max(batches, key=lambda batch: batch.computed)))
