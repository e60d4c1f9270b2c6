"""The recipe: load, adapt, data, train, save."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.adapters.peft_files import save_adapter
from qingtune.config.training import TrainConfig
from qingtune.data.prepare import Data, check_files_exist, load_data
from qingtune.data.tokenize import Template
from qingtune.errors import UserError
from qingtune.files.staging import staging_folder
from qingtune.files.write import copy_file, disk_errors, write_json
from qingtune.kernels.device import Hardware, choose_hardware, reset_peak
from qingtune.machine.describe import describe_machine, describe_processes
from qingtune.machine.signals import put_off
from qingtune.models.find import context_length, find_model, fingerprint, stored_in_4bit
from qingtune.models.load import load_template, local_folder, save_model, stored_dtype
from qingtune.output.console import give, labelled, lost_output, say, show
from qingtune.output.invocation import command_line
from qingtune.output.quiet import quieten
from qingtune.output.redaction import redact, redact_values
from qingtune.output.units import duration
from qingtune.planning.of_run import RunPlan, keep_measured_speed, plan_run, try_to_plan
from qingtune.planning.report import as_lines, short_lines
from qingtune.runs.folder import (
    check_output_folder,
    only_run_in,
    prepare_output_folder,
    put_result,
    refuse_inputs,
)
from qingtune.runs.measures import loss_of_result
from qingtune.runs.page.source import read_curves
from qingtune.runs.page.write import PageOfRun
from qingtune.runs.plots import plot_losses, try_to_draw
from qingtune.runs.record import (
    CURVE,
    FACTS,
    METRICS,
    PAGE,
    SAMPLES,
    SETTINGS,
    Record,
    settings_to_compare,
    versions,
    without_secrets,
    write_record,
)
from qingtune.training.events import ConsoleSink, Evaluated, EverySteps, LinesFile, MetricsFile, Sink, to_all
from qingtune.training.finished import already_finished, digests_of_inputs
from qingtune.training.loop import Limits, Progress, Work
from qingtune.training.loop import train as run_loop
from qingtune.training.model import count_parameters, load_adapted_model
from qingtune.training.processes import AcceleratedProcesses
from qingtune.training.resume import (
    Start,
    check_checkpoint_exists,
    check_start,
    choose_start,
    load_best,
)
from qingtune.training.sample_answers import SampleAnswers
from qingtune.training.setup import check_room, limits_of, make_trained, make_work, resume, say_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """The outcome of a run; losses are means over trained tokens, None if nothing was evaluated.

    Attributes:
        peak_bytes: the most memory held.
        eval_samples: of the evaluation data, behind the losses.
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
    eval_samples: int = 0


def train(config: TrainConfig, *, notices: Sequence[str] = (), command: str = "") -> bool:
    """Train as configured and write the result to output_dir.

    Args:
        config: checked and resolved.
        notices: lines to show first.
        command: resumes the run.

    Returns:
        True if the result is written, False if a signal ended the run early; its state is saved then.

    Raises:
        UserError: any error that the user can fix.
    """
    quieten()
    output_dir = Path(config.output_dir)
    processes = AcceleratedProcesses(config.report_to, output_dir)
    first = processes.index == 0
    with ExitStack() as stack:
        if not first:
            stack.enter_context(labelled(None))
        processes.by_all(
            lambda: check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
        )
        processes.by_first(lambda: _check_output(config))
        processes.by_first(lambda: stack.enter_context(only_run_in(output_dir)))
        for notice in [*notices, *filter(None, [describe_processes(processes.count)])]:
            say(notice)
        result = _run(config, processes)
        if result is None:
            return True
        if not result.finished:
            again = command if command and processes.count == 1 else "run the same command again"
            say(f"Stopped and saved after step {result.steps}. To resume: {again}")
            return False
        if first:
            show(_summary(config, result))
    processes.finish()
    return True


def _check_output(config: TrainConfig) -> None:
    """Make sure before anything is loaded that output_dir can take the result, and that a named checkpoint is there.

    Raises:
        UserError: it cannot, or is not.
    """
    output_dir = Path(config.output_dir)
    check_output_folder(output_dir, overwrite=config.overwrite_output_dir)
    refuse_inputs(
        output_dir,
        {
            "the data": map(Path, [*(config.data_path or []), *(config.eval_data_path or [])]),
            "the model": [Path(config.model_name_or_path)] if os.path.exists(config.model_name_or_path) else [],
        },
    )
    check_checkpoint_exists(config)


@dataclass(frozen=True)
class Opened:
    """What a run has before any weight is read.

    Attributes:
        folder: the base model's.
        inputs: digests of what the data is made of, as it was when it was read.
    """

    hardware: Hardware
    folder: Path
    template: Template
    inputs: dict[str, str]
    data: Data


def _run(config: TrainConfig, processes: AcceleratedProcesses) -> Result | None:
    """Train and, unless a signal ended that early, write the result; None if it is there, or only planned for."""
    output_dir, opened = Path(config.output_dir), _open(config, processes)
    if config.dry_run:
        report = _plan(config, opened, processes).report
        if processes.index == 0:
            give("\n".join(as_lines(report)))
        return None
    plan = try_to_plan(lambda: _plan(config, opened, processes))
    start = _agree_on_start(config, opened, processes)
    if start.done:
        say(already_finished(output_dir))
        return None
    for line in short_lines(plan.report) if plan else ():
        say(line)
    model = processes.by_all(lambda: load_adapted_model(config, opened.folder, opened.hardware))
    processes.by_first(lambda: _begin_folder(config, start.checkpoint))
    page = PageOfRun(output_dir)
    result = _train(config, opened, model, start, processes, page)
    result = replace(result, planned_bytes=plan and plan.planned_bytes(), eval_samples=len(opened.data.evaluation))
    if plan and processes.count == 1:
        keep_measured_speed(plan, output_dir / METRICS)
    if processes.index == 0:
        with put_off("Writing the result first. Press Ctrl-C again to exit at once."):
            if result.finished:
                _write(config, opened, model, start, result)
            page.write()
    return result


def _plan(config: TrainConfig, opened: Opened, processes: AcceleratedProcesses) -> RunPlan:
    return plan_run(config, opened.folder, opened.hardware, opened.data, processes.count)


def _agree_on_start(config: TrainConfig, opened: Opened, processes: AcceleratedProcesses) -> Start:
    """How the run starts: chosen by the first process from its disk, and possible in all of them."""
    settings = settings_to_compare(config, processes.count, opened.data.hash, fingerprint(opened.folder))
    steps = limits_of(config, len(opened.data.train), processes.count).total_steps
    start = processes.by_first(lambda: choose_start(config, settings, steps))
    processes.by_all(lambda: check_start(start, settings) if processes.index else None)
    return start


def _open(config: TrainConfig, processes: AcceleratedProcesses) -> Opened:
    """Choose the hardware, find the model, read the data."""
    hardware = choose_hardware(config.bf16, config.fp16, processes.local_index)
    reset_peak(hardware.device)
    say(f"Device: {hardware.reason}.")
    with processes.main_first():
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = local_folder(source, config.cache_dir)
    say(f"Model: {source.name} ({source.path}).")
    if config.method == "full" and stored_in_4bit(folder):
        raise UserError(
            "full training needs unquantised weights, and this model is stored in 4 bits",
            where=str(folder),
            fix="Pass the model in 16 bits, or pass --use_qlora.",
        )
    template = load_template(folder)
    for notice in template.notices:
        say(notice)
    inputs = digests_of_inputs(config, folder)
    return Opened(hardware, folder, template, inputs, load_data(config, template, context_length(folder)))


def _begin_folder(config: TrainConfig, resume_from: Path | None) -> None:
    """Prepare the output folder for this run, with the checkpoint it resumes from."""
    output_dir = Path(config.output_dir)
    prepare_output_folder(output_dir, start_over=resume_from is None and config.overwrite_output_dir)
    write_json(output_dir / SETTINGS, redact_values(config.model_dump(mode="json")))
    if resume_from and (resume_from / METRICS).exists():
        copy_file(resume_from / METRICS, output_dir / METRICS)


def _facts(opened: Opened, processes: AcceleratedProcesses, limits: Limits) -> dict[str, Any]:
    """What the run knows of itself when it starts, for its page."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = {"device": opened.hardware.reason, "processes": processes.count, **describe_machine(), "started": started}
    return {
        "data": asdict(opened.data.report),
        "machine": machine,
        "versions": versions(),
        "total_steps": limits.total_steps,
    }


def _record(config: TrainConfig, opened: Opened, start: Start, result: Result) -> Record:
    """What the run says of itself."""
    return Record(
        method=config.method,
        base_model=config.model_name_or_path,
        base_fingerprint=fingerprint(opened.folder),
        system_prompt=config.system_prompt,
        prompt_style=opened.data.style,
        stop_ids=sorted(opened.template.stop_ids),
        settings=without_secrets(start.settings),
        results={
            **asdict(result),
            "evaluation_data": opened.data.evaluation_hash,
            "inputs": opened.inputs,
            **(start.extends.results() if start.extends else {}),
            **({"lost_output": lost} if (lost := lost_output()) else {}),
        },
        versions=versions(),
    )


# --- Training --------------------------------------------------------------------------------------------------------


def _train(
    config: TrainConfig,
    opened: Opened,
    model: PreTrainedModel,
    start: Start,
    processes: AcceleratedProcesses,
    page: PageOfRun,
) -> Result:
    """Train from where the run starts, evaluating before the first step too, so that the gain can be reported."""
    limits = limits_of(config, len(opened.data.train), processes.count)
    work, progress = _set_up(config, opened, model, start, limits, processes)
    evaluations: list[Evaluated] = []
    began = time.perf_counter()
    with ExitStack() as stack:
        sinks: list[Sink] = [lambda event: evaluations.append(event) if isinstance(event, Evaluated) else None]
        if processes.index == 0:
            write_json(Path(config.output_dir) / FACTS, redact_values(_facts(opened, processes, limits)))
            sinks += _observers(stack, config, limits, progress, [processes.track, page])
            if config.eval_samples:
                sinks.append(stack.enter_context(_sample_answers(config, opened, model, progress)))
        emit = to_all(sinks)
        if limits.evaluate_every and not progress.step:
            loss, tokens = work.evaluate()
            emit(Evaluated(0, 0.0, loss, tokens, time.perf_counter() - began))
        finished = run_loop(work, limits, processes, emit, progress)
    after = [event.eval_loss for event in evaluations if event.step > 0]
    trained, parameters = count_parameters(model)
    return Result(
        finished=finished,
        steps=progress.step,
        seconds=round(time.perf_counter() - began, 1),
        peak_bytes=work.peak_bytes(),
        planned_bytes=None,
        trained_parameters=trained,
        parameters=parameters,
        eval_loss_before=read_curves(Path(config.output_dir) / METRICS).eval_loss_before,  # of the first start
        eval_loss=after[-1] if after else None,
        best_eval_loss=progress.best_loss if progress.best_step else None,
        best_step=progress.best_step,
    )


def _set_up(
    config: TrainConfig,
    opened: Opened,
    model: PreTrainedModel,
    start: Start,
    limits: Limits,
    processes: AcceleratedProcesses,
) -> tuple[Work, Progress]:
    """What the loop works with, where the run stands; all processes end where one of them cannot train."""
    data, hardware, settings = opened.data, opened.hardware, without_secrets(start.settings)
    trained = make_trained(config, model, hardware)
    work = processes.by_all(lambda: make_work(config, model, trained, data, hardware, processes, settings))
    progress = processes.by_all(lambda: resume(trained, start.checkpoint))
    processes.by_first(lambda: check_room(config, work.parameters, limits))
    say_length(config, len(data.train), processes.count)
    return work, progress


def _observers(
    stack: ExitStack, config: TrainConfig, limits: Limits, progress: Progress, others: Sequence[Sink]
) -> list[Sink]:
    """The console and the log of measurements, both open as long as the stack.

    Args:
        others: who get the logged measurements too.
    """
    console = stack.enter_context(ConsoleSink(limits.total_steps, progress.step))
    metrics = stack.enter_context(MetricsFile(Path(config.output_dir) / METRICS, progress.step))
    logged = to_all([metrics, console.log, *others])
    return [console, EverySteps(config.logging_steps, limits.total_steps, logged, progress.unlogged)]


def _sample_answers(config: TrainConfig, opened: Opened, model: PreTrainedModel, progress: Progress) -> SampleAnswers:
    """What writes answers to the first rows of the evaluation data."""
    file = LinesFile(Path(config.output_dir) / SAMPLES, progress.step)
    mixed = opened.hardware.dtype if config.method == "full" or config.modules_to_save else None
    asked = opened.data.evaluation[: config.eval_samples]
    return SampleAnswers(file, model, opened.template, asked, context_length(opened.folder), mixed)


# --- The result ------------------------------------------------------------------------------------------------------


def _write(config: TrainConfig, opened: Opened, model: PreTrainedModel, start: Start, result: Result) -> None:
    """Write what the run came to: the best weights where these are wanted, its record and its curves."""
    output_dir = Path(config.output_dir)
    if config.load_best_model_at_end and result.best_step not in (None, result.steps):
        load_best(output_dir, model, result.best_step, result.best_eval_loss)
    save_result(config, model, opened.template, opened.folder, _record(config, opened, start, result))
    title = output_dir.resolve().name
    try_to_draw(lambda: plot_losses(output_dir / METRICS, output_dir / CURVE, title), CURVE)


def save_result(config: TrainConfig, model: Any, template: Template, base_folder: Path, record: Record) -> None:
    """Write the adapter, or after full training the model, with its tokenizer; the record comes last."""
    output_dir = Path(config.output_dir)
    fix = "Free disk space and run the same command again: it resumes from the last checkpoint."
    with disk_errors("the result", output_dir, fix), staging_folder(output_dir / "result") as half_done:
        if config.method == "full":
            save_model(model, half_done, stored_dtype(base_folder))
        else:
            base = str(base_folder.absolute()) if _is_gguf(config) else config.model_name_or_path
            save_adapter(model, half_done, redact(base), config.lora_dropout)
        template.tokenizer.save_pretrained(half_done)
        put_result(half_done, output_dir)
    write_record(output_dir, record)


def _is_gguf(config: TrainConfig) -> bool:
    """Whether the base is a .gguf file, which PEFT cannot open: it is given the converted copy in the cache."""
    return config.model_name_or_path.endswith(".gguf")


def _loss_line(config: TrainConfig, result: Result) -> list[str]:
    """What training did to eval_loss: of the weights that were kept, and on how many samples; nothing without it."""
    loss = loss_of_result(vars(result), best_kept=config.load_best_model_at_end)
    if loss is None:
        return []
    start = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f} -> "
    best = result.best_step if config.load_best_model_at_end else None
    kept = "" if best is None else f", at step {best:,} (the best)"
    return [f"eval_loss {start}{loss:.4f} on {result.eval_samples:,} samples{kept}"]


def _summary(config: TrainConfig, result: Result) -> str:
    """The closing lines: what came out, and how to talk to it."""
    planned = f" (planned: {result.planned_bytes['total'] / 1e9:.2f})" if result.planned_bytes else ""
    speed = read_curves(Path(config.output_dir) / METRICS).tokens_per_second
    lines = [
        f"{result.steps} steps in {duration(result.seconds)}, {f'{speed:,.0f} tokens/s, ' if speed else ''}"
        f"peak memory {result.peak_bytes / 1e9:.2f} GB{planned}"
    ]
    lines += _loss_line(config, result)
    base, adapter = config.model_name_or_path, config.output_dir
    if config.method == "full":
        base, adapter = config.output_dir, None
    talk = command_line("chat", base_model=base, lora_model=adapter)
    if (Path(config.output_dir) / PAGE).exists():
        lines.append(f"Report: {Path(config.output_dir) / PAGE}")
    lines += [f"Some messages were lost ({lost})." for lost in lost_output()]
    if config.method != "full" and _is_gguf(config):
        lines.append(
            "PEFT opens it with the converted copy of the .gguf file, which exists only on this machine. Before you "
            "publish the adapter, set base_model_name_or_path in adapter_config.json to the model's name on its hub."
        )
    lines += [f"Result: {config.output_dir}", f"Chat with it: {talk}"]
    return "\n".join(lines)
