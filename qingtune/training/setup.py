"""Configuration, model and data -> what the training loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qingtune.adapters.lora import why_general
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
from qingtune.training.checkpoint import load_checkpoint, parse_state, prune, save_checkpoint, save_parts
from qingtune.training.engine import Engine, make_engine, trained_bytes
from qingtune.training.loop import Limits, Progress, Work
from qingtune.training.optim import make_optimizer, make_schedule, warmup_steps
from qingtune.training.processes import Processes
from qingtune.training.resume import Start
from qingtune.training.shards import ShardedUnits, why_not_sharded

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
    holders = processes.count if work.parts else 1
    processes.by_first(lambda: _check_room(config, work.parameters, limits, result_bytes, holders))
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
    units = _shard(config, model, hardware, processes)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained |= units.parts if units else {}
    optimizer, notice = make_optimizer(config, trained.items(), device)
    if notice:
        say(notice)
    scaler = torch.amp.GradScaler(device.type, enabled=hardware.dtype == torch.float16)
    longest = max(len(sample.token_ids) for sample in [*data.train, *data.evaluation])
    engine = make_engine(config, model, hardware, longest, evaluates=bool(data.evaluation), units=units)
    filler = _shortest(data.train).to(device) if units else None
    total = limits_of(config, plan).total_steps

    def save(now: Progress) -> None:
        """Write a checkpoint, from one process or each its part, and remove those that are too many."""
        if units and units.parts:
            save_parts(output_dir, trained, units.rows, optimizer, now, settings, versions(), processes)
            processes.by_first(lambda: prune(output_dir, config.save_total_limit, now))
            return
        try:
            if processes.index == 0:
                save_checkpoint(output_dir, trained, optimizer, now, settings, versions(), scaler)
                prune(output_dir, config.save_total_limit, now)
        finally:
            processes.wait()

    progress = Progress()
    if start.checkpoint:
        load_checkpoint(start.checkpoint, trained, optimizer, scaler, units.rows if units else None)
        progress = parse_state(start.checkpoint).progress
    model.train()
    work = Work(
        parameters=list(trained.values()),
        add_gradients=engine.add_gradients,
        fetch=_fetcher(data.train, plan, device, processes.index, engine),
        shrink=engine.shrink,
        optimizer=optimizer,
        learning_rate=make_schedule(config.lr_scheduler_type, config.learning_rate, warmup_steps(config, total), total),
        evaluate=_evaluator(config, data.evaluation, model, device, processes, engine, filler),
        save=save,
        peak_bytes=lambda: peak_bytes(device),
        scaler=scaler,
        parts=list(units.parts.values()) if units else (),
        filler=filler,
        gather=(lambda: units.gather(keep=processes.index == 0)) if units and units.parts else (lambda: None),
    )
    return work, progress


def _fetcher(
    samples: list[Sample], plan: Plan, device: torch.device, process: int, engine: Engine
) -> Callable[[int], list[Batch]]:
    """A function that gives a process's micro-batches of a step, as large as the engine takes at a time."""

    def fetch(step: int) -> list[Batch]:
        return [
            collate(group, shares=engine.shares).to(device)
            for share in plan.micro_batches(step, process)
            for group in split_evenly([samples[i] for i in share], engine.most_tokens, shares=engine.shares)
        ]

    return fetch


def _shard(
    config: TrainConfig, model: PreTrainedModel, hardware: Hardware, processes: Processes
) -> ShardedUnits | None:
    """The model's units where the settings shard them; None where this process holds the whole model.

    Raises:
        UserError: the model or the hardware is one for which that is not done.
    """
    if config.shard == "none" or processes.count == 1:
        return None
    reason = why_general(model, hardware.device.type) or why_not_sharded(model)
    if hardware.dtype == torch.float16:
        reason = "training in fp16 scales losses, which each process would do by itself; use bf16 or fp32"
    if reason:
        raise UserError(f"this run cannot be sharded: {reason}", where="shard", fix="Set shard none.")
    return ShardedUnits(model, hardware.device, trains_weights=config.method == "full")


def _shortest(samples: Sequence[Sample]) -> Batch:
    """The shortest sample that trains a token, as a micro-batch."""
    return collate([min((one for one in samples if one.trained_tokens), key=lambda one: len(one.token_ids))])


def _check_room(
    config: TrainConfig, trained: Sequence[torch.nn.Parameter], limits: Limits, result: int, holders: int
) -> None:
    """Look at the disk before hours of work; holders: processes among which what is trained is divided."""
    checkpoint = sum(trained_bytes(config, trained)) * holders
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
    config: TrainConfig,
    samples: list[Sample],
    model: PreTrainedModel,
    device: torch.device,
    processes: Processes,
    engine: Engine,
    filler: Batch | None,
) -> Callable[[], tuple[float, int]]:
    """A function that gives the mean loss over the trained tokens of the evaluation data, and their number.

    filler: for passes that a process makes only because the others do; None where they make theirs by themselves.
    """
    batch_size = config.per_device_eval_batch_size
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no fp64

    def evaluate() -> tuple[float, int]:
        model.eval()
        sums, mine = torch.zeros(2, dtype=dtype), batches[processes.index :: processes.count]
        if filler:
            passes = torch.zeros(processes.count, dtype=torch.int64)
            passes[processes.index] = sum(len(_groups(batch, engine)) for batch in mine)
            passes = processes.sum(passes)
            for _ in range(int(passes.max() - passes[processes.index])):
                engine.loss(filler)
        for samples_of_batch in mine:
            sums += torch.tensor(_sums_within_memory(samples_of_batch, engine, device), dtype=dtype)
        model.train()
        total, tokens = processes.sum(sums).tolist()
        return total / tokens, int(tokens)

    return evaluate


def _groups(samples: list[Sample], engine: Engine) -> list[list[Sample]]:
    """The passes without gradients that samples take."""
    return split_evenly(samples, engine.most_tokens, shares=engine.loss_shares)


def _sums_within_memory(samples: list[Sample], engine: Engine, device: torch.device) -> tuple[float, int]:
    """The summed loss and the trained tokens of samples, in smaller passes when memory runs out."""
    while True:
        batches = [collate(group, shares=engine.loss_shares).to(device) for group in _groups(samples, engine)]
        try:
            return sum(float(engine.loss(batch)) for batch in batches), sum(len(batch.targets) for batch in batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        say(engine.shrink(max(batches, key=lambda batch: batch.computed)))
