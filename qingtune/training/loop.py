"""The training loop: the only optimizer.step in the project.

A window is the samples of one optimizer step. Its gradient is that of the summed loss divided by the window's trained
tokens, over all micro-batches and processes: never a mean of means. Order, dropout and learning rate are functions of
the seed and the step number alone, so a resumed run does what it would have done uninterrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qingtune.data.batch import Batch
from qingtune.errors import UserError, is_out_of_memory
from qingtune.kernels.device import memory_errors
from qingtune.machine.signals import put_off
from qingtune.training.events import Evaluated, Noted, Sink, Stepped
from qingtune.training.optim import Schedule

if TYPE_CHECKING:
    from qingtune.training.processes import Processes

MOST_BAD_STEPS_IN_A_ROW = 5
LEANER = "Use less memory: optim adamw_8bit, LoRA or QLoRA, a smaller lora_r."


@dataclass(frozen=True)
class Work:
    """What is trained, by what; the recipe makes it.

    Attributes:
        parameters: the trained parameters.
        add_gradients: micro-batch, scale -> its summed loss; adds scale times that loss's gradient to the parameters'.
        fetch: step, counted from 0 -> this process's micro-batches, on the device.
        shrink: the largest micro-batch, after one ran out of memory -> a line for the user; `fetch` then gives smaller
            ones. A UserError if they cannot be smaller.
        optimizer: over the parameters.
        learning_rate: step, counted from 0 -> learning rate.
        evaluate: -> mean loss and trained tokens of the evaluation data.
        save: writes a checkpoint; a UserError if the disk does not take it.
        peak_bytes: -> the most memory held so far.
        scaler: loss scaling for fp16; disabled otherwise.
        parts: those of the parameters that are this process's part of a sharded one, as its gradient then is.
        filler: a tiny micro-batch for passes that a process makes only because sharded ones make each pass together;
            None where they do not.
        gather: makes a sharded model whole in the first process, for the result; all processes call it.
    """

    parameters: Sequence[torch.nn.Parameter]
    add_gradients: Callable[[Batch, torch.Tensor], torch.Tensor]
    fetch: Callable[[int], Sequence[Batch]]
    shrink: Callable[[Batch], str]
    optimizer: torch.optim.Optimizer
    learning_rate: Schedule
    evaluate: Callable[[], tuple[float, int]]
    save: Callable[[Progress], None]
    peak_bytes: Callable[[], int]
    scaler: torch.amp.GradScaler
    parts: Sequence[torch.nn.Parameter] = ()
    filler: Batch | None = None
    gather: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Limits:
    """When things happen; `every` values are in steps, None for never; save_best saves each best evaluation too."""

    total_steps: int
    steps_per_epoch: int
    max_grad_norm: float
    seed: int
    evaluate_every: int | None
    save_every: int | None
    save_best: bool = False


@dataclass
class Progress:
    """Progress of a run: what a checkpoint needs in addition to weights and optimizer.

    Attributes:
        step: steps done.
        best_loss: of the best evaluation, after best_step.
        bad_steps: steps without an update before this one, in a row.
        unlogged: steps done since the last logged line.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    bad_steps: int = 0
    unlogged: list[Stepped] = field(default_factory=list)


def train(work: Work, limits: Limits, processes: Processes, emit: Sink, progress: Progress) -> bool:
    """Train from `progress` to the last step.

    Returns:
        True if all steps are done, False if a signal ended the run early; the state is saved then.

    Raises:
        UserError: a window has no trained token; loss or gradient are not finite several steps in a row; or a run that
            was asked to stop cannot be saved.
    """
    with put_off("Finishing the step, then saving. Press Ctrl-C again to exit at once.") as received:
        while progress.step < limits.total_steps:
            emit(_step(work, limits, processes, emit, progress))
            last = progress.step == limits.total_steps
            if _due(limits.evaluate_every, progress.step, last):
                _evaluate(work, limits, emit, progress)
            stopping = bool(processes.sum(torch.tensor(len(received))))
            best = limits.save_best and progress.best_step == progress.step
            if stopping and not last:
                work.save(progress)
                return False
            if _due(limits.save_every, progress.step, last) or best:
                try:
                    work.save(progress)
                except UserError as error:  # the disk may take the next one, and nothing is won by stopping
                    emit(Noted(f"Warning: {error} Training continues."))
    return True


def _due(every: int | None, step: int, last: bool) -> bool:
    return every is not None and (step % every == 0 or last)


def _step(work: Work, limits: Limits, processes: Processes, emit: Sink, progress: Progress) -> Stepped:
    """One window: gradient, checks, update."""
    began = time.perf_counter()
    step = progress.step
    batches = work.fetch(step)
    counts = [sum(len(batch.targets) for batch in batches), sum(len(batch.token_ids) for batch in batches)]
    counts += [len(batches) * (index == processes.index) for index in range(processes.count)]
    counts = processes.sum(torch.tensor(counts, device=work.parameters[0].device)).tolist()
    trained, tokens, passes = *counts[:2], max(counts[2:])
    if not trained:
        origins = ", ".join(origin for batch in batches for origin in batch.origins)
        raise UserError("the samples of a step have no trained token", where=origins)
    batches, losses = _within_memory(work, batches, trained, [limits.seed, step, processes.index], emit)
    if work.filler:
        for _ in range(passes - len(batches)):
            work.add_gradients(work.filler, torch.zeros_like(losses.sum()))
    loss = processes.sum(losses.sum())
    _sum_gradients(_whole(work), processes)
    work.scaler.unscale_(work.optimizer)
    norm = _clip(work, limits.max_grad_norm or math.inf, processes)
    mean_loss, grad_norm = (float(value) for value in torch.stack([loss / trained, norm]))
    rate = work.learning_rate(step)
    _update(work, rate, math.isfinite(mean_loss) and math.isfinite(grad_norm), progress)
    progress.step += 1
    if progress.bad_steps:
        rows = _rows_to_blame(batches, losses)
        emit(Noted(f"step {progress.step}: loss {mean_loss}, gradient norm {grad_norm}: no update. Rows: {rows}"))
    return Stepped(
        step=progress.step,
        epoch=progress.step / limits.steps_per_epoch,
        loss=mean_loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        tokens=tokens,
        trained_tokens=trained,
        seconds=time.perf_counter() - began,
        peak_bytes=work.peak_bytes(),
    )


def _within_memory(
    work: Work, batches: Sequence[Batch], trained: int, seed: list[int], emit: Sink
) -> tuple[Sequence[Batch], torch.Tensor]:
    """The window's gradients, begun again in smaller micro-batches when memory runs out; the batches and losses."""
    while True:
        try:
            return batches, _backward(work, batches, trained, seed)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Not in the handler, as the error would keep what the failed pass held.
        work.optimizer.zero_grad(set_to_none=False)
        emit(Noted(work.shrink(max(batches, key=lambda batch: batch.computed))))
        _, step, _ = seed
        batches = work.fetch(step)


def _backward(work: Work, batches: Sequence[Batch], trained: int, seed: list[int]) -> torch.Tensor:
    """Gradients of this process's micro-batches; returns the summed loss of each, fp32 [batches]."""
    losses = torch.zeros(len(batches), device=work.parameters[0].device)
    scale = work.scaler.scale(losses.new_tensor(1 / trained))
    for number, batch in enumerate(batches):
        torch.manual_seed(hash((*seed, number)) % 2**63)  # dropout: the same whether or not the run was interrupted
        if len(batch.targets):
            losses[number] = work.add_gradients(batch, scale)
        elif work.filler:
            work.add_gradients(work.filler, torch.zeros_like(scale))
    return losses


def _rows_to_blame(batches: Sequence[Batch], losses: torch.Tensor) -> str:
    """The rows of micro-batches with a loss that is not finite; all rows of the step if only the gradient is not."""
    bad = [batch for batch, loss in zip(batches, losses.tolist(), strict=True) if not math.isfinite(loss)]
    return ", ".join(origin for batch in bad or batches for origin in batch.origins)


def _sum_gradients(parameters: Sequence[torch.nn.Parameter], processes: Processes) -> None:
    """Sum gradients over processes, each dtype as one flat tensor; a process without samples adds zeros."""
    if processes.count == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):  # in the same order in every process
        grads = [parameter.grad for parameter in parameters if parameter.dtype == dtype and parameter.grad is not None]
        flat = processes.sum(torch.cat([grad.reshape(-1) for grad in grads]))
        for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


def _whole(work: Work) -> list[torch.nn.Parameter]:
    """The parameters that every process holds in full."""
    parts = set(work.parts)
    return [parameter for parameter in work.parameters if parameter not in parts]


def _clip(work: Work, most: float, processes: Processes) -> torch.Tensor:
    """Scale the gradients so that their norm over all processes' parts is at most this; returns what it was."""
    if not work.parts:
        return torch.nn.utils.clip_grad_norm_(work.parameters, most)
    of_parts, of_whole = (
        torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
        for some in (work.parts, _whole(work))
    )
    norm = (processes.sum(of_parts.square()) + of_whole.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(work.parameters, most, norm)
    return norm


def _update(work: Work, rate: float, finite: bool, progress: Progress) -> None:
    """Step if everything is finite. In fp16 the scaler lowers its scale instead, which is normal at the start."""
    for group in work.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
    if finite:
        with memory_errors("the weights were updated", None, LEANER):
            work.scaler.step(work.optimizer)
        progress.bad_steps = 0
    else:
        progress.bad_steps += 1
        limit = MOST_BAD_STEPS_IN_A_ROW * (4 if work.scaler.is_enabled() else 1)
        if progress.bad_steps >= limit:
            raise UserError(
                f"loss or gradient was not finite {limit} steps in a row",
                where=f"step {progress.step + 1}",
                fix="Start over with a lower learning_rate (--overwrite_output_dir).",
            )
    work.scaler.update()
    work.optimizer.zero_grad(set_to_none=False)  # the memory is needed again at once


def _evaluate(work: Work, limits: Limits, emit: Sink, progress: Progress) -> None:
    began = time.perf_counter()
    loss, tokens = work.evaluate()
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
    epoch = progress.step / limits.steps_per_epoch
    emit(Evaluated(progress.step, epoch, loss, tokens, time.perf_counter() - began))
