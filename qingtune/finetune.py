"""The recipe: load, adapt, data, train, save."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qingtune.adapters.files import save_adapter
from qingtune.adapters.lora import LoRALinear, add_lora
from qingtune.adapters.variants import TAKEN, Variant
from qingtune.adapters.whole import find_modules, train_in_full
from qingtune.base import load_base
from qingtune.config import TrainConfig
from qingtune.continuation import check_checkpoint_exists, is_finished, load_best, where_to_go_on
from qingtune.data.prepare import Data, Say, check_files_exist, load_data
from qingtune.data.tokenize import Template, make_template
from qingtune.environment import describe_machine
from qingtune.errors import UserError
from qingtune.files import copy_file, disk_errors, staging_folder, usual_permissions, write_json
from qingtune.hardware import Hardware, choose_hardware
from qingtune.kernels.linear import QuantizedLinear
from qingtune.memory import EIGHT_BITS
from qingtune.models.load import load_tokenizer, local_folder, save_model, stop_ids, stored_dtype
from qingtune.models.source import context_length, find_model, fingerprint, stored_in_4bit
from qingtune.output_folder import check_output_folder, only_run_in, prepare_output_folder
from qingtune.plan_report import as_lines, short_lines
from qingtune.plots import plot_losses
from qingtune.quiet import quieten
from qingtune.record import (
    CURVE,
    FACTS,
    METRICS,
    PAGE,
    SAMPLES,
    SETTINGS,
    Record,
    settings_to_compare,
    versions,
    write_record,
)
from qingtune.redaction import redact_values
from qingtune.report import PageOfRun
from qingtune.run_plan import keep_measured_speed, plan_run, try_to_plan
from qingtune.sample_answers import SampleAnswers
from qingtune.training.events import ConsoleSink, Evaluated, EverySteps, LinesFile, MetricsFile, Sink, to_all
from qingtune.training.loop import Limits, Progress, Work, train
from qingtune.training.processes import AcceleratedProcesses
from qingtune.work import make_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """What a run came to; losses are means over trained tokens, None where nothing was evaluated.

    Attributes:
        peak_bytes: the most memory held.
        planned_bytes: what was planned for it: parts, and their total. None for models that planning does not know.
    """

    finished: bool
    steps: int
    seconds: float
    peak_bytes: int
    planned_bytes: dict[str, int] | None
    trained_parameters: int
    parameters: int
    eval_loss_before: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None


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
    check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
    check_checkpoint_exists(config)
    processes = AcceleratedProcesses(config.report_to, output_dir)
    say = _say if processes.index == 0 else _say_nothing
    for notice in notices:
        say(notice)
    with only_run_in(output_dir) if processes.index == 0 else nullcontext():
        result = _run(config, processes, say)
        if result is None:
            return True
        if not result.finished:
            say(f"Stopped and saved after step {result.steps}. To go on: {command or 'run the same command again'}")
            return False
        if processes.index == 0:
            print(_summary(config, result, chat_command))
    processes.finish()
    return True


def _run(config: TrainConfig, processes: AcceleratedProcesses, say: Say) -> Result | None:
    """Train and, unless a signal ended that early, write the result; None if it is there, or only planned for."""
    output_dir = Path(config.output_dir)
    hardware = choose_hardware(config.bf16, config.fp16, processes.local_index)
    say(f"Device: {hardware.reason}.")
    with processes.main_first():
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = local_folder(source, config.cache_dir, say)
    say(f"Model: {source.name} ({source.path}).")
    if config.method == "full" and stored_in_4bit(folder):
        raise UserError(
            "full training needs the weights themselves, and this model is stored in 4 bits",
            where=str(folder),
            fix="Name the model in 16 bits, or pass --use_qlora.",
        )
    template = make_template(load_tokenizer(folder), stop_ids(folder))
    for notice in template.notices:
        say(notice)
    data = load_data(config, template, context_length(folder), say)
    if config.dry_run:
        report = plan_run(config, folder, hardware, data, processes.count).report
        if processes.index == 0:
            print("\n".join(as_lines(report)))
        return None
    plan = try_to_plan(lambda: plan_run(config, folder, hardware, data, processes.count), say)

    settings = settings_to_compare(config, processes.count, data.hash, fingerprint(folder))
    if is_finished(config, settings, say):
        return None
    resume_from = where_to_go_on(config, settings, say)
    for line in short_lines(plan.report) if plan else ():
        say(line)
    model = load_adapted_model(config, folder, hardware, say)
    _check_vocabulary(model, template, folder)
    if processes.index == 0:
        prepare_output_folder(output_dir, anew=resume_from is None and config.overwrite_output_dir)
        write_json(output_dir / SETTINGS, redact_values(config.model_dump(mode="json")))
        if resume_from and (resume_from / METRICS).exists():
            copy_file(resume_from / METRICS, output_dir / METRICS)
    processes.wait()

    work, limits, progress = make_work(config, model, data, hardware, processes, settings, resume_from, say)
    page, answers = PageOfRun(output_dir, say), None
    if processes.index == 0:
        write_json(output_dir / FACTS, redact_values(_facts(hardware, processes, data, limits)))
        if config.eval_samples:
            file = LinesFile(output_dir / SAMPLES, progress.step)
            mixed = hardware.dtype if config.method == "full" or config.modules_to_save else None
            asked = data.evaluation[: config.eval_samples]
            answers = SampleAnswers(file, model, template, asked, context_length(folder), mixed)
    result = _train(config, work, limits, progress, processes, page, answers, count_parameters(model))
    result = replace(result, planned_bytes=plan and plan.planned_bytes())
    if plan and processes.count == 1:
        keep_measured_speed(plan, output_dir / METRICS, say)
    del work  # and with it the optimizer's states, before the result takes memory
    if not result.finished:
        if processes.index == 0:
            page.write()
        return result
    if config.load_best_model_at_end:
        load_best(output_dir, model, progress, say)
    if processes.index == 0:
        save_result(config, model, template, folder, _record(config, folder, template, data, settings, result))
        plot_losses(output_dir / METRICS, output_dir / CURVE, title=output_dir.resolve().name)
        page.write()
    return result


def _facts(hardware: Hardware, processes: AcceleratedProcesses, data: Data, limits: Limits) -> dict[str, Any]:
    """What the run knows of itself when it starts, for its page."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = {"device": hardware.reason, "processes": processes.count, **describe_machine(), "started": started}
    return {
        "data": asdict(data.report),
        "machine": machine,
        "versions": versions(),
        "total_steps": limits.total_steps,
    }


def _record(
    config: TrainConfig, folder: Path, template: Template, data: Data, settings: dict[str, Any], result: Result
) -> Record:
    """What the run says of itself; `folder` is the base model's."""
    return Record(
        method=config.method,
        base_model=config.model_name_or_path,
        base_fingerprint=fingerprint(folder),
        system_prompt=config.system_prompt,
        prompt_style=data.style,
        stop_ids=sorted(template.stop_ids),
        settings=settings,
        results={**asdict(result), "evaluation_data": data.evaluation_hash},
        versions=versions(),
    )


def _check_vocabulary(model: PreTrainedModel, template: Template, folder: Path) -> None:
    if len(template.tokenizer) > cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings:
        raise UserError("the tokenizer knows more tokens than the model has embeddings", where=str(folder))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(_text: str) -> None:
    pass


# --- Model -----------------------------------------------------------------------------------------------------------


def load_adapted_model(config: TrainConfig, folder: Path, hardware: Hardware, say: Say) -> PreTrainedModel:
    """The model on its device, quantised and with adapters as the method asks; the trained share is told.

    Adapters train in fp32 on weights in the hardware's dtype. Full training keeps the weights in fp32, as small steps
    would be lost in 16 bits, and computes in the hardware's dtype; only our 8-bit optimizer, which rounds at random so
    that they are not lost on average, works on weights in 16 bits.
    """
    full = config.method == "full"
    bits = config.quantization_bit if config.method == "qlora" else None
    narrow = config.optim in EIGHT_BITS and hardware.device.type == "cpu" and hardware.dtype == torch.bfloat16
    dtype = torch.float32 if full and not narrow else hardware.dtype
    model = load_base(folder, dtype, bits, hardware.device, config.cache_dir, say)
    if full and dtype == stored_dtype(folder):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # what is loaded as it is stored may lie in the file's pages
    if not full:
        _add_adapters(config, model, say)
    trained, everything = count_parameters(model)
    say(f"Trainable: {trained:,} of {everything:,} parameters ({trained / everything:.2%}).")
    return model


def _add_adapters(config: TrainConfig, model: PreTrainedModel, say: Say) -> None:
    """Put adapters on a model, of the kind that the settings name, and let modules_to_save be trained."""
    assert config.lora_alpha is not None
    variant = Variant(
        init_lora_weights=config.init_lora_weights,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        layers_to_transform=config.layers_to_transform,
    )
    if config.init_lora_weights in TAKEN:
        say(f"{config.init_lora_weights}: the adapters' start is taken out of the weights; this may take minutes.")
    whole = find_modules(model, config.modules_to_save)
    adapters = add_lora(
        model, config.lora_target_modules, config.lora_r, config.lora_alpha, config.lora_dropout,
        seed=config.seed, variant=variant, leave=whole,
    )  # fmt: skip
    say(_kind_of_adapters(config, adapters))
    if config.loraplus_lr_ratio:
        say(f"LoRA+: B matrices learn at {config.loraplus_lr_ratio:g} times the learning rate that is shown.")
    for notice in train_in_full(model, whole):
        say(notice)
    if whole:
        say(f"Trained in full, in fp32: {', '.join(whole)}.")


def _kind_of_adapters(config: TrainConfig, adapters: dict[str, LoRALinear]) -> str:
    """A line for the user: kind, rank, scaling, and where."""
    ranks = sorted({adapter.r for adapter in adapters.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    scalings = sorted({f"{adapter.scaling:.4g}" for adapter in adapters.values()})
    scaling = f", scaled by alpha / sqrt(rank) = {' or '.join(scalings)}" if config.use_rslora else ""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    name = "DoRA" if config.use_dora else "LoRA"
    return f"{name}: rank {rank}, alpha {config.lora_alpha:g}{scaling}, on {len(adapters)} layers ({', '.join(kinds)})."


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Trained parameters, and all of them; packed weights count as what they stand for."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, packed + sum(p.numel() for p in model.parameters())


# --- Training --------------------------------------------------------------------------------------------------------


def _train(
    config: TrainConfig,
    work: Work,
    limits: Limits,
    progress: Progress,
    processes: AcceleratedProcesses,
    page: PageOfRun,
    answers: SampleAnswers | None,
    counts: tuple[int, int],
) -> Result:
    """Run the loop with its sinks, evaluating before the first step too, so that what training gained can be told.

    Args:
        counts: trained parameters, and all of them.
    """
    output_dir = Path(config.output_dir)
    evaluations: list[Evaluated] = []
    began = time.perf_counter()
    with ExitStack() as stack:
        sinks: list[Sink] = [lambda event: evaluations.append(event) if isinstance(event, Evaluated) else None]
        if processes.index == 0:
            console = stack.enter_context(ConsoleSink(limits.total_steps, progress.step))
            metrics = stack.enter_context(MetricsFile(output_dir / METRICS, progress.step))
            logged = to_all([metrics, processes.track, console.log, page])
            sinks += [console, EverySteps(config.logging_steps, limits.total_steps, logged, progress.unlogged)]
        if answers:
            sinks.append(stack.enter_context(answers))
        emit = to_all(sinks)
        if limits.evaluate_every and not progress.step:
            loss, tokens = work.evaluate()
            emit(Evaluated(0, 0.0, loss, tokens, time.perf_counter() - began))
        finished = train(work, limits, processes, emit, progress)
    before = [event.eval_loss for event in evaluations if event.step == 0]
    after = [event.eval_loss for event in evaluations if event.step > 0]
    return Result(
        finished=finished,
        steps=progress.step,
        seconds=round(time.perf_counter() - began, 1),
        peak_bytes=work.peak_bytes(),
        planned_bytes=None,
        trained_parameters=counts[0],
        parameters=counts[1],
        eval_loss_before=before[0] if before else None,
        eval_loss=after[-1] if after else None,
        best_eval_loss=progress.best_loss if progress.best_step else None,
        best_step=progress.best_step,
    )


# --- The result ------------------------------------------------------------------------------------------------------


def save_result(config: TrainConfig, model: Any, template: Template, base_folder: Path, record: Record) -> None:
    """Write the adapter, or after full training the model, with its tokenizer; the record comes last."""
    output_dir = Path(config.output_dir)
    fix = "Make room and run the same command again: it goes on from the last checkpoint."
    with disk_errors("the result", output_dir, fix), staging_folder(output_dir / "result") as half_done:
        if config.method == "full":
            save_model(model, half_done, stored_dtype(base_folder))
        else:
            save_adapter(model, half_done, config.model_name_or_path, config.lora_dropout)
        template.tokenizer.save_pretrained(half_done)
        for path in half_done.iterdir():
            usual_permissions(path)
            os.replace(path, output_dir / path.name)
    write_record(output_dir, record)


def _summary(config: TrainConfig, result: Result, chat_command: str) -> str:
    """The closing lines: what came out, and how to talk to it."""
    planned = f" (planned: {result.planned_bytes['total'] / 1e9:.2f})" if result.planned_bytes else ""
    lines = [f"{result.steps} steps in {result.seconds:,.0f} s, peak memory {result.peak_bytes / 1e9:.2f} GB{planned}"]
    if result.eval_loss is not None:
        start = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f} -> "
        lines.append(f"eval_loss {start}{result.eval_loss:.4f}")
    base = config.output_dir if config.method == "full" else config.model_name_or_path
    adapter = "" if config.method == "full" else f" --lora_model {config.output_dir}"
    if (Path(config.output_dir) / PAGE).exists():
        lines.append(f"Report: {Path(config.output_dir) / PAGE}")
    lines += [f"Result: {config.output_dir}", f"Talk to it: {chat_command} --base_model {base}{adapter}"]
    return "\n".join(lines)
