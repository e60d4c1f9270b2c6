"""The recipe: load, adapt, data, train, save."""

from __future__ import annotations

import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qingtune import __version__
from qingtune.adapters.files import save_adapter
from qingtune.adapters.lora import add_lora
from qingtune.adapters.quantize import quantize_model
from qingtune.config import TrainConfig
from qingtune.data.batch import Batch, Plan, collate
from qingtune.data.prepare import Data, Say, load_data
from qingtune.data.tokenize import Template, make_template
from qingtune.errors import UserError
from qingtune.files import staging_folder, usual_permissions, write_json
from qingtune.hardware import Hardware, choose_hardware, peak_bytes
from qingtune.kernels.attention import use_end_to_end
from qingtune.kernels.loss import summed_loss
from qingtune.models.load import load_model, load_tokenizer, local_folder, save_model, stop_ids, stored_dtype
from qingtune.models.source import context_length, find_model, fingerprint
from qingtune.plots import plot_losses
from qingtune.quiet import quieten
from qingtune.record import (
    CURVE,
    METRICS,
    SETTINGS,
    Record,
    check_output_folder,
    clear_output_folder,
    differences,
    read_record,
    settings_to_compare,
    write_record,
)  # fmt: skip
from qingtune.training.checkpoint import checkpoints, load_checkpoint, prune, read_state, save_checkpoint
from qingtune.training.events import ConsoleSink, Evaluated, Event, EverySteps, MetricsFile, to_all
from qingtune.training.loop import Limits, Progress, Work, train
from qingtune.training.optim import make_optimizer, make_schedule, warmup_steps
from qingtune.training.processes import AcceleratedProcesses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANEW = "Pass --overwrite_output_dir to train anew, or choose another output_dir."


def finetune(
    config: TrainConfig, *, notices: Sequence[str] = (), command: str = "", chat_command: str = "qingtune chat"
) -> bool:
    """Train as configured and write the result to output_dir.

    Args:
        config: checked and resolved.
        notices: lines to show first.
        command: what the user typed, shown where it can be used again.
        chat_command: how to start a chat, shown at the end.

    Returns:
        True if the result is written, False if a signal ended the run early; its state is saved then.

    Raises:
        UserError: anything that the user can mend.
    """
    quieten()
    output_dir = Path(config.output_dir)
    check_output_folder(output_dir, overwrite=config.overwrite_output_dir)
    processes = AcceleratedProcesses(config.report_to, output_dir)
    say = _say if processes.index == 0 else _say_nothing
    for notice in notices:
        say(notice)
    hardware = choose_hardware(config.bf16, config.fp16, processes.local_index)
    say(f"Device: {hardware.reason}.")

    with processes.main_first():
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = local_folder(source, config.cache_dir, say)
    say(f"Model: {source.name} ({source.path}).")
    template = make_template(load_tokenizer(folder), stop_ids(folder))
    for notice in template.notices:
        say(notice)
    data = load_data(config, template, context_length(folder), say)

    settings = settings_to_compare(config, processes.count, data.hash)
    if _is_finished(config, settings, say):
        return True
    resume_from = _where_to_go_on(config, settings, say)
    torch.manual_seed(config.seed)
    model = load_adapted_model(config, folder, hardware, say)
    if len(template.tokenizer) > cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings:
        raise UserError("the tokenizer knows more tokens than the model has embeddings", where=str(folder))

    if processes.index == 0:
        if config.overwrite_output_dir and resume_from is None:
            clear_output_folder(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SETTINGS, config.model_dump(mode="json"))
    processes.wait()
    finished, results = _train(config, model, data, hardware, processes, settings, resume_from, say)
    if not finished:
        say(f"Stopped and saved after step {results['steps']}. To go on: {command or 'run the same command again'}")
        return False
    if processes.index == 0:
        record = Record(
            method=config.method,
            base_model=config.model_name_or_path,
            base_fingerprint=fingerprint(folder),
            system_prompt=config.system_prompt,
            prompt_style=data.style,
            stop_ids=sorted(template.stop_ids),
            results=results,
            versions=_versions(),
        )
        save_result(config, model, template, folder, record)
        plot_losses(output_dir / METRICS, output_dir / CURVE)
        print(_summary(config, results, chat_command))
    processes.finish()
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(_text: str) -> None:
    pass


# --- Model -----------------------------------------------------------------------------------------------------------


def load_adapted_model(config: TrainConfig, folder: Path, hardware: Hardware, say: Say) -> PreTrainedModel:
    """The model on its device, quantised and with adapters as the method asks; the trained share is told.

    Adapters train in fp32 on weights in the hardware's dtype. Full training keeps the weights in fp32, as small steps
    would be lost in 16 bits, and computes in the hardware's dtype.
    """
    full = config.method == "full"
    model = load_model(folder, torch.float32 if full else hardware.dtype)
    if config.method == "qlora":
        quantize_model(model, config.quantization_bit, hardware.device)
    else:
        model.to(hardware.device)  # pyright: ignore[reportArgumentType]
    if not full:
        assert config.lora_alpha is not None
        adapters = add_lora(
            model, config.lora_target_modules, config.lora_r, config.lora_alpha, config.lora_dropout, seed=config.seed
        )
        kinds = sorted({name.rsplit(".", 1)[-1] for name in adapters})
        say(f"LoRA: rank {config.lora_r}, alpha {config.lora_alpha:g}, on {len(adapters)} layers ({', '.join(kinds)}).")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = trained if full else trained + _parameters_of_base(model)
    say(f"Trainable: {trained:,} of {everything:,} parameters ({trained / everything:.2%}).")
    return model


def _parameters_of_base(model: PreTrainedModel) -> int:
    """Parameters that are not trained, packed weights counted as what they stand for."""
    from qingtune.kernels.linear import QuantizedLinear

    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return packed + sum(p.numel() for p in model.parameters() if not p.requires_grad)


# --- Training --------------------------------------------------------------------------------------------------------


def _is_finished(config: TrainConfig, settings: dict[str, Any], say: Say) -> bool:
    """Whether output_dir holds the result of this very run, so that nothing is left to do.

    Raises:
        UserError: it holds another run's result, which must not be replaced unasked.
    """
    output_dir = Path(config.output_dir)
    if config.overwrite_output_dir or not output_dir.is_dir() or read_record(output_dir) is None:
        return False
    found = checkpoints(output_dir)
    if config.resume_from_checkpoint is False or not found:
        raise UserError("output_dir holds a finished run", where=str(output_dir), fix=ANEW)
    _same_settings(found[-1].folder, settings)
    say(f"This run is finished already; its result is in {output_dir}. {ANEW}")
    return True


def _where_to_go_on(config: TrainConfig, settings: dict[str, Any], say: Say) -> Path | None:
    """The checkpoint to go on from; None to start anew.

    Raises:
        UserError: the checkpoint is none, or of a run with other settings, or must not be passed over unasked.
    """
    wish = config.resume_from_checkpoint
    if isinstance(wish, str) and wish not in ("auto", "last"):
        checkpoint = Path(wish)
    else:
        found = [] if config.overwrite_output_dir else checkpoints(Path(config.output_dir))
        if not found:
            return None
        if wish is False:
            raise UserError("output_dir holds a run that can go on", where=config.output_dir, fix=ANEW)
        checkpoint = found[-1].folder
    _same_settings(checkpoint, settings)
    say(f"Going on from {checkpoint}.")
    return checkpoint


def _same_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    changed = differences(read_state(checkpoint)[1], settings)
    if changed:
        raise UserError(
            "this run was started with other settings:\n  " + "\n  ".join(changed) + f"\n{ANEW}",
            where=str(checkpoint),
        )


def _train(
    config: TrainConfig, model: PreTrainedModel, data: Data, hardware: Hardware, processes: AcceleratedProcesses,
    settings: dict[str, Any], resume_from: Path | None, say: Say,
) -> tuple[bool, dict[str, Any]]:  # fmt: skip
    """Set the loop up and run it; returns whether it was finished, and its results."""
    output_dir = Path(config.output_dir)
    plan = Plan(
        len(data.train), config.per_device_train_batch_size, config.gradient_accumulation_steps, processes.count,
        config.seed,
    )  # fmt: skip
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * plan.steps_per_epoch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, notice = make_optimizer(config, trained.items(), hardware.device)
    if notice:
        say(notice)
    reason = use_end_to_end(model)
    if reason:
        say(f"Samples go through the model one by one: {reason}.")
    progress = Progress()
    if resume_from:
        load_checkpoint(resume_from, trained, optimizer)
        progress = read_state(resume_from)[0]
    assert config.learning_rate is not None

    def loss_of(batch: Batch) -> torch.Tensor:
        mixed = config.method == "full" and hardware.dtype != torch.float32
        with torch.autocast(hardware.device.type, hardware.dtype, enabled=mixed):
            return summed_loss(model, batch, end_to_end=reason is None)

    def fetch(step: int) -> list[Batch]:
        shares = plan.micro_batches(step, processes.index)
        return [collate([data.train[i] for i in share]).to(hardware.device) for share in shares]

    def save(now: Progress) -> None:
        if processes.index == 0:
            save_checkpoint(output_dir, trained, optimizer, now, settings)
            prune(output_dir, config.save_total_limit, now.best_step)
        processes.wait()

    work = Work(
        parameters=list(trained.values()),
        loss=loss_of,
        fetch=fetch,
        optimizer=optimizer,
        learning_rate=make_schedule(config.lr_scheduler_type, config.learning_rate, warmup_steps(config, total), total),
        evaluate=_evaluator(config, model, data, hardware, processes, loss_of),
        save=save,
        peak_bytes=lambda: peak_bytes(hardware.device),
        scaler=torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16),
    )
    limits = Limits(
        total_steps=total,
        steps_per_epoch=plan.steps_per_epoch,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        evaluate_every=_every(config.eval_strategy, config.eval_steps, plan.steps_per_epoch),
        save_every=_every(config.save_strategy, config.save_steps, plan.steps_per_epoch),
    )
    say(
        f"Training: {total:,} steps of {plan.window_size} samples ({total / plan.steps_per_epoch:.3g} epochs), "
        f"{config.optim}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}."
    )
    evaluations: list[Evaluated] = []
    began = time.perf_counter()
    with ExitStack() as stack:
        sinks: list[Callable[[Event], None]] = []
        if processes.index == 0:
            console = stack.enter_context(ConsoleSink(total, progress.step))
            metrics = MetricsFile(output_dir / METRICS, progress.step)
            logged = to_all([metrics, processes.track, console.log])
            sinks = [console, EverySteps(config.logging_steps, total, logged)]
        emit = to_all([*sinks, lambda event: evaluations.append(event) if isinstance(event, Evaluated) else None])
        model.train()
        if limits.evaluate_every and not progress.step:
            loss, tokens = work.evaluate()
            emit(Evaluated(0, 0.0, loss, tokens, time.perf_counter() - began))
        finished = train(work, limits, processes, emit, progress)
    if finished and config.load_best_model_at_end and progress.best_step not in (None, progress.step):
        _load_best(output_dir, progress, trained, say)
    results = {
        "steps": progress.step,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": peak_bytes(hardware.device),
        "eval_loss_before": evaluations[0].eval_loss if evaluations and not evaluations[0].step else None,
        "eval_loss": evaluations[-1].eval_loss if evaluations and evaluations[-1].step else None,
        "best_eval_loss": progress.best_loss if progress.best_step else None,
        "best_step": progress.best_step,
    }
    return finished, results


def _every(strategy: str | None, steps: int | None, steps_per_epoch: int) -> int | None:
    return {"steps": steps, "epoch": steps_per_epoch}.get(strategy or "no")


def _load_best(output_dir: Path, progress: Progress, trained: dict[str, torch.nn.Parameter], say: Say) -> None:
    best = [c for c in checkpoints(output_dir) if c.step == progress.best_step]
    if not best:
        say(f"Step {progress.best_step} evaluated best but was not saved; the result is the last step.")
        return
    load_checkpoint(best[0].folder, trained, None)
    say(f"The result is step {progress.best_step}, the best evaluation ({progress.best_loss:.4f}).")


def _evaluator(
    config: TrainConfig, model: PreTrainedModel, data: Data, hardware: Hardware, processes: AcceleratedProcesses,
    loss_of: Callable[[Batch], torch.Tensor],
) -> Callable[[], tuple[float, int]]:  # fmt: skip
    """A function that gives the mean loss over the trained tokens of the evaluation data, and their number."""
    size = config.per_device_eval_batch_size
    groups = [data.evaluation[start : start + size] for start in range(0, len(data.evaluation), size)]

    @torch.no_grad()
    def evaluate() -> tuple[float, int]:
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for group in groups[processes.index :: processes.count]:
            batch = collate(group).to(hardware.device)
            sums += torch.tensor([float(loss_of(batch)), len(batch.targets)], dtype=torch.float64)
        model.train()
        loss, tokens = processes.sum(
            sums.to(torch.float32 if hardware.device.type == "mps" else torch.float64)
        ).tolist()
        return loss / tokens, int(tokens)

    return evaluate


# --- The result ------------------------------------------------------------------------------------------------------


def save_result(config: TrainConfig, model: Any, template: Template, base_folder: Path, record: Record) -> None:
    """Write the adapter, or after full training the model, with its tokenizer; the record comes last."""
    output_dir = Path(config.output_dir)
    with staging_folder(output_dir / "result") as half_done:
        if config.method == "full":
            save_model(model, half_done, stored_dtype(base_folder))
        else:
            save_adapter(model, half_done, config.model_name_or_path, config.lora_dropout)
        template.tokenizer.save_pretrained(half_done)
        for path in half_done.iterdir():
            usual_permissions(path)
            os.replace(path, output_dir / path.name)
    write_record(output_dir, record)


def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    return {"qingtune": __version__, **{name: importlib.metadata.version(name) for name in libraries}}


def _summary(config: TrainConfig, results: dict[str, Any], chat_command: str) -> str:
    """The closing lines: what came out, and how to talk to it."""
    lines = [
        f"{results['steps']} steps in {results['seconds']:,.0f} s, peak memory {results['peak_bytes'] / 1e9:.2f} GB",
        f"Result: {config.output_dir}",
    ]
    if results["eval_loss"] is not None:
        before = results["eval_loss_before"]
        start = f"{before:.4f} -> " if before is not None else ""
        lines.insert(1, f"eval_loss {start}{results['eval_loss']:.4f}")
    base = config.output_dir if config.method == "full" else config.model_name_or_path
    adapter = "" if config.method == "full" else f" --lora_model {config.output_dir}"
    lines.append(f"Talk to it: {chat_command} --base_model {base}{adapter}")
    return "\n".join(lines)
