"""The recipe: load, adapt, data, train, save."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.config.training import TrainConfig
from qingtune.data.order import Plan
from qingtune.data.prepare import Data, check_files_exist, load_data
from qingtune.data.tokenize import Template
from qingtune.errors import UserError
from qingtune.files.write import copy_file, write_json
from qingtune.kernels.device import Hardware, choose_hardware, reset_peak
from qingtune.machine.describe import describe_machine, describe_processes
from qingtune.machine.signals import put_off
from qingtune.models.find import context_length, find_model, stored_in_4bit
from qingtune.models.load import load_template, local_folder
from qingtune.output.console import give, labelled, lost_output, say, show
from qingtune.output.invocation import command_line
from qingtune.output.quiet import quieten
from qingtune.output.redaction import redact_values
from qingtune.output.units import counted, duration
from qingtune.planning.of_run import keep_measured_speed, plan_run
from qingtune.planning.report import Report, as_lines, short_lines
from qingtune.runs.folder import check_output_folder, only_run_in, prepare_output_folder, refuse_inputs
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
)
from qingtune.training.events import ConsoleSink, Evaluated, EverySteps, LinesFile, MetricsFile, Noted, Sink, to_all
from qingtune.training.finished import already_finished, digests_of_inputs
from qingtune.training.loop import Limits, Progress
from qingtune.training.loop import train as run_loop
from qingtune.training.model import count_parameters, load_adapted_model
from qingtune.training.processes import Processes
from qingtune.training.result import Base, is_gguf, keep_run_without_base, save_result
from qingtune.training.resume import Start, check_checkpoint_exists, check_start, choose_start, load_best, what_is_left
from qingtune.training.sample_answers import SampleAnswers
from qingtune.training.setup import limits_of, set_up

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
    processes = Processes(config.report_to, output_dir)
    with ExitStack() as stack:
        if processes.index:
            stack.enter_context(labelled(None))
        processes.by_all(
            lambda: check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
        )
        processes.by_first(lambda: _check_output(config))
        processes.by_first(lambda: stack.enter_context(only_run_in(output_dir)))
        for notice in filter(None, [*notices, describe_processes(processes.count, sharded=config.shard != "none")]):
            say(notice)
        again = command if command and processes.count == 1 else "run the same command again"
        try:
            result = _run(config, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_is_left(config, again)) from None
        if result is None:
            return True
        if not result.finished:
            say(f"Stopped and saved after step {result.steps}. To resume: {again}")
            return False
        if processes.index == 0:
            show(_summary(config, result))
    processes.finish()
    return True


def _check_output(config: TrainConfig) -> None:
    """Make sure before anything is loaded that output_dir can take the result, and that a named checkpoint is there."""
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
class _Run:
    """What a run has before any weight is read.

    Attributes:
        base: the model that it starts from.
        inputs: digests of what the data is made of, as it was when it was read.
    """

    config: TrainConfig
    processes: Processes
    hardware: Hardware
    base: Base
    template: Template
    inputs: dict[str, str]
    data: Data

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)


def _run(config: TrainConfig, processes: Processes) -> Result | None:
    """Train and, unless a signal ended that early, write the result; None if it is there, or only planned for."""
    run = _open(config, processes)
    plan = _plan(run)
    if config.dry_run:
        if plan and processes.index == 0:
            give("\n".join(as_lines(plan)))
        return None
    start = _agree_on_start(run)
    if start.done:
        say(already_finished(run.output_dir))
        return None
    for line in short_lines(plan) if plan else ():
        say(line)
    model = processes.by_all(lambda: load_adapted_model(config, run.folder, run.hardware))
    processes.by_first(lambda: _begin_folder(run, start.checkpoint))
    page = PageOfRun(run.output_dir)
    result = _train(run, model, start, plan, page)
    if plan and processes.count == 1:
        keep_measured_speed(plan, run.output_dir / METRICS)
    if processes.index == 0:
        with put_off("Writing the result first. Press Ctrl-C again to exit at once."):
            if result.finished:
                _write(run, model, start, result)
            page.write()
    return result


def _open(config: TrainConfig, processes: Processes) -> _Run:
    """Choose the hardware, find the model, read the data."""
    hardware = choose_hardware(config.bf16, config.fp16, processes.local_index)
    reset_peak(hardware.device)
    say(f"Device: {hardware.reason}.")
    with processes.main_first():
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = local_folder(source, config.cache_dir)
    place = "" if source.path == Path(source.name) else f" ({source.path})"
    say(f"Model: {source.name}{place}.")
    if config.method == "full" and stored_in_4bit(folder):
        raise UserError(
            "full training needs unquantised weights, and this model is stored in 4 bits",
            where=str(folder),
            fix="Pass the model in 16 bits, or pass --use_qlora.",
        )
    template = load_template(folder)
    for notice in template.notices:
        say(notice)
    inputs, data = digests_of_inputs(config, folder), load_data(config, template, context_length(folder))
    return _Run(config, processes, hardware, Base.of(folder), template, inputs, data)


def _plan(run: _Run) -> Report | None:
    """The plan; None where the model's shape is not known to planning, which keeps no run from training."""
    try:
        return plan_run(run.config, run.folder, run.hardware, run.data, run.processes.count)
    except UserError as error:
        if run.config.dry_run:
            raise
        say(f"No plan of memory: {error}")
        return None


def _agree_on_start(run: _Run) -> Start:
    """How the run starts: chosen by the first process from its disk, and possible in all of them."""
    config, processes = run.config, run.processes
    settings = settings_to_compare(config, processes.count, run.data.hash, run.base.fingerprint)
    steps = limits_of(config, Plan.of(config, len(run.data.train), processes.count)).total_steps
    start = processes.by_first(lambda: choose_start(config, settings, steps))
    processes.by_all(lambda: check_start(start, settings) if processes.index else None)
    return start


def _begin_folder(run: _Run, resume_from: Path | None) -> None:
    """Prepare the output folder for this run, with the checkpoint it resumes from."""
    prepare_output_folder(run.output_dir, start_over=resume_from is None and run.config.overwrite_output_dir)
    write_json(run.output_dir / SETTINGS, redact_values(run.config.model_dump(mode="json")))
    if resume_from and (resume_from / METRICS).exists():
        copy_file(resume_from / METRICS, run.output_dir / METRICS)


# --- Training --------------------------------------------------------------------------------------------------------


def _train(run: _Run, model: PreTrainedModel, start: Start, plan: Report | None, page: PageOfRun) -> Result:
    """Train from where the run starts, evaluating before the first step too, so that the gain can be reported."""
    processes = run.processes
    taken = run.base.bytes_taken(run.config, model)
    size = run.base.result_bytes(run.config, model)
    work, limits, progress = set_up(run.config, model, run.data, run.hardware, start, processes, size)
    if taken is not None:
        say(f"The result takes all that is not text from {run.folder}: keep it there until the run is finished.")
    evaluations: list[Evaluated] = []
    began = time.perf_counter()
    with ExitStack() as stack:
        sinks: list[Sink] = [lambda event: evaluations.append(event) if isinstance(event, Evaluated) else None]
        if processes.index == 0:
            write_json(run.output_dir / FACTS, redact_values(_facts(run, limits)))
            sinks += _observers(stack, run, model, limits, progress, page)
        emit = to_all(sinks)
        if limits.evaluate_every and not progress.step:
            emit(Noted(f"Evaluating {len(run.data.evaluation):,} samples before the first step ..."))
            loss, tokens = work.evaluate()
            emit(Evaluated(0, 0.0, loss, tokens, time.perf_counter() - began))
        finished = run_loop(work, limits, processes, emit, progress)
    if finished and taken is not None:
        keep_run_without_base(run.base, run.output_dir, processes, work, progress)
    after = [event.eval_loss for event in evaluations if event.step > 0]
    trained, parameters = count_parameters(model)
    if finished:
        work.gather()
    return Result(
        finished=finished,
        steps=progress.step,
        seconds=round(time.perf_counter() - began, 1),
        peak_bytes=work.peak_bytes(),
        planned_bytes=plan and plan.planned_bytes,
        trained_parameters=trained,
        parameters=parameters,
        eval_loss_before=read_curves(run.output_dir / METRICS).eval_loss_before,  # of the first start
        eval_loss=after[-1] if after else None,
        best_eval_loss=progress.best_loss if progress.best_step else None,
        best_step=progress.best_step,
        eval_samples=len(run.data.evaluation),
    )


def _facts(run: _Run, limits: Limits) -> dict[str, Any]:
    """What the run knows of itself when it starts, for its page."""
    device, started = run.hardware.reason, datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = {"device": device, "processes": run.processes.count, **describe_machine(), "started": started}
    data = asdict(run.data.report)
    return {"data": data, "machine": machine, "versions": versions(), "total_steps": limits.total_steps}


def _observers(
    stack: ExitStack, run: _Run, model: PreTrainedModel, limits: Limits, progress: Progress, page: PageOfRun
) -> list[Sink]:
    """The console, what gets the logged measurements, and the answers to samples; open as long as the stack."""
    config = run.config
    console = stack.enter_context(ConsoleSink(limits.total_steps, progress.step))
    metrics = stack.enter_context(closing(MetricsFile(run.output_dir / METRICS, progress.step)))
    logged = to_all([metrics, console.log, run.processes.track, page])
    sinks: list[Sink] = [console, EverySteps(config.logging_steps, limits.total_steps, logged, progress.unlogged)]
    if config.eval_samples:
        file = stack.enter_context(closing(LinesFile(run.output_dir / SAMPLES, progress.step)))
        mixed = run.hardware.dtype if config.method == "full" or config.modules_to_save else None
        asked = run.data.evaluation[: config.eval_samples]
        sinks.append(SampleAnswers(file, model, run.template, asked, context_length(run.folder), mixed))
    return sinks


# --- The result ------------------------------------------------------------------------------------------------------


def _write(run: _Run, model: PreTrainedModel, start: Start, result: Result) -> None:
    """Write what the run came to: the best weights where these are wanted, its record and its curves."""
    config, output_dir = run.config, run.output_dir
    if config.load_best_model_at_end and result.best_step not in (None, result.steps):
        load_best(output_dir, model, result.best_step, result.best_eval_loss)
    record = Record(
        method=config.method,
        base_model=config.model_name_or_path,
        base_fingerprint=run.base.fingerprint,
        system_prompt=config.system_prompt,
        prompt_style=run.data.style,
        stop_ids=sorted(run.template.stop_ids),
        settings=without_secrets(start.settings),
        results={
            **asdict(result),
            "evaluation_data": run.data.evaluation_hash,
            "inputs": run.inputs,
            **({"extended": start.extended} if start.extended else {}),
            **({"lost_output": lost} if (lost := lost_output()) else {}),
        },
        versions=versions(),
    )
    save_result(config, model, run.template, run.base, record)
    title = output_dir.resolve().name
    try_to_draw(lambda: plot_losses(output_dir / METRICS, output_dir / CURVE, title), CURVE)


def _loss_line(config: TrainConfig, result: Result) -> list[str]:
    """What training did to eval_loss: of the weights that were kept, and on how many samples; nothing without it."""
    loss = loss_of_result(vars(result), best_kept=config.load_best_model_at_end)
    if loss is None:
        return []
    start = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f} -> "
    best = result.best_step if config.load_best_model_at_end else None
    kept = "" if best is None else f", at step {best:,} (the best)"
    return [f"eval_loss {start}{loss:.4f} on {counted(result.eval_samples, 'sample')}{kept}"]


def _summary(config: TrainConfig, result: Result) -> str:
    """The closing lines: what came out, and how to talk to it."""
    output_dir = Path(config.output_dir)
    planned = f" (planned: {result.planned_bytes['total'] / 1e9:.2f})" if result.planned_bytes else ""
    speed = read_curves(output_dir / METRICS).tokens_per_second
    lines = [
        f"{counted(result.steps, 'step')} in {duration(result.seconds)}, {f'{speed:,.0f} tokens/s, ' if speed else ''}"
        f"peak memory {result.peak_bytes / 1e9:.2f} GB{planned}"
    ]
    lines += _loss_line(config, result)
    if (output_dir / PAGE).exists():
        lines.append(f"Report: {output_dir / PAGE}")
    lines += [f"Some messages were lost ({lost})." for lost in lost_output()]
    if config.method == "full":
        talk = command_line("chat", base_model=config.output_dir)
    else:
        talk = command_line("chat", base_model=config.model_name_or_path, lora_model=config.output_dir)
        if is_gguf(config):
            lines.append(
                "PEFT opens it with the converted copy of the .gguf file, which exists only on this machine. Before "
                "you publish the adapter, set base_model_name_or_path in adapter_config.json to the model's name on "
                "its hub."
            )
    lines += [f"Result: {config.output_dir}", f"Chat with it: {talk}"]
    return "\n".join(lines)
