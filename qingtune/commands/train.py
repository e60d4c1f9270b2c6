"""The recipe: load, adapt, data, train, save."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
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
from qingtune.kernels.device import Hardware, choose_hardware
from qingtune.machine.describe import describe_machine
from qingtune.machine.signals import put_off
from qingtune.models.find import context_length, find_model, fingerprint, stored_in_4bit
from qingtune.models.load import load_template, local_folder, save_model, stored_dtype
from qingtune.output.console import give, labelled, lost_output, say, show
from qingtune.output.invocation import command_line
from qingtune.output.quiet import quieten
from qingtune.output.redaction import redact, redact_values
from qingtune.output.units import duration
from qingtune.planning.of_run import keep_measured_speed, plan_run, try_to_plan
from qingtune.planning.report import as_lines, short_lines
from qingtune.runs.folder import (
    check_output_folder,
    only_run_in,
    prepare_output_folder,
    put_result,
    refuse_files_in_the_way,
    refuse_inputs,
)
from qingtune.runs.losses import loss_of_result
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
    Finished,
    check_checkpoint_exists,
    finished_run,
    load_best,
    say_extension,
    where_to_go_on,
)
from qingtune.training.sample_answers import SampleAnswers
from qingtune.training.setup import make_work, planned_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """What a run came to; losses are means over trained tokens, None where nothing was evaluated.

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
        command: by which the same run goes on.

    Returns:
        True if the result is written, False if a signal ended the run early; its state is saved then.

    Raises:
        UserError: anything that the user can mend.
    """
    quieten()
    output_dir = Path(config.output_dir)
    check_output_folder(output_dir, overwrite=config.overwrite_output_dir)
    check_files_exist({"data_path": config.data_path, "eval_data_path": config.eval_data_path})
    refuse_inputs(
        output_dir,
        {
            "the data": map(Path, [*(config.data_path or []), *(config.eval_data_path or [])]),
            "the model": [Path(config.model_name_or_path)] if os.path.exists(config.model_name_or_path) else [],
        },
    )
    check_checkpoint_exists(config)
    processes = AcceleratedProcesses(config.report_to, output_dir)
    first = processes.index == 0
    with only_run_in(output_dir) if first else nullcontext(), nullcontext() if first else labelled(None):
        for notice in notices:
            say(notice)
        result = _run(config, processes)
        if result is None:
            return True
        if not result.finished:
            again = command if command and processes.count == 1 else "run the same command again"
            say(f"Stopped and saved after step {result.steps}. To go on: {again}")
            return False
        if first:
            show(_summary(config, result))
    processes.finish()
    return True


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
    hardware, folder, data = opened.hardware, opened.folder, opened.data
    if config.dry_run:
        report = plan_run(config, folder, hardware, data, processes.count).report
        if processes.index == 0:
            give("\n".join(as_lines(report)))
        return None
    plan = try_to_plan(lambda: plan_run(config, folder, hardware, data, processes.count))
    settings = settings_to_compare(config, processes.count, data.hash, fingerprint(folder))
    total_steps = planned_steps(config, len(data.train), processes.count)
    finished = finished_run(config, settings, total_steps)
    if finished and finished.steps in (0, total_steps):
        say(already_finished(output_dir))
        return None
    if finished:
        refuse_files_in_the_way(output_dir)
        say_extension(config, finished, total_steps)
    resume_from = where_to_go_on(config, settings, finished)
    settings = without_secrets(settings)  # from here on only written
    for line in short_lines(plan.report) if plan else ():
        say(line)
    model = load_adapted_model(config, folder, hardware)
    if processes.index == 0:
        _begin_folder(config, resume_from)
    processes.wait()

    work, limits, progress = make_work(config, model, data, hardware, processes, settings, resume_from)
    page, answers = PageOfRun(output_dir), None
    if processes.index == 0:
        write_json(output_dir / FACTS, redact_values(_facts(hardware, processes, data, limits)))
        answers = _sample_answers(config, opened, model, progress) if config.eval_samples else None
    result = _train(config, work, limits, progress, processes, page, answers, count_parameters(model))
    result = replace(
        result, planned_bytes=plan and plan.planned_bytes(), eval_samples=len(data.evaluation) if data.evaluation else 0
    )
    if plan and processes.count == 1:
        keep_measured_speed(plan, output_dir / METRICS)
    del work  # and with it the optimizer's states, before the result takes memory
    with put_off("Writing the result first. Once more to leave at once."):
        if result.finished and config.load_best_model_at_end:
            load_best(output_dir, model, progress)
        if processes.index == 0:
            if result.finished:
                record = _record(config, opened, settings, result, finished)
                save_result(config, model, opened.template, folder, record)
                title = output_dir.resolve().name
                try_to_draw(lambda: plot_losses(output_dir / METRICS, output_dir / CURVE, title), CURVE)
            page.write()
    return result


def _open(config: TrainConfig, processes: AcceleratedProcesses) -> Opened:
    """Choose the hardware, find the model, read the data."""
    hardware = choose_hardware(config.bf16, config.fp16, processes.local_index)
    say(f"Device: {hardware.reason}.")
    with processes.main_first():
        source = find_model(config.model_name_or_path, config.cache_dir, config.hub)
        folder = local_folder(source, config.cache_dir)
    say(f"Model: {source.name} ({source.path}).")
    if config.method == "full" and stored_in_4bit(folder):
        raise UserError(
            "full training needs the weights themselves, and this model is stored in 4 bits",
            where=str(folder),
            fix="Name the model in 16 bits, or pass --use_qlora.",
        )
    template = load_template(folder)
    for notice in template.notices:
        say(notice)
    inputs = digests_of_inputs(config, folder)
    return Opened(hardware, folder, template, inputs, load_data(config, template, context_length(folder)))


def _begin_folder(config: TrainConfig, resume_from: Path | None) -> None:
    """Make the output folder that of this run, with what it goes on from."""
    output_dir = Path(config.output_dir)
    prepare_output_folder(output_dir, anew=resume_from is None and config.overwrite_output_dir)
    write_json(output_dir / SETTINGS, redact_values(config.model_dump(mode="json")))
    if resume_from and (resume_from / METRICS).exists():
        copy_file(resume_from / METRICS, output_dir / METRICS)


def _sample_answers(config: TrainConfig, opened: Opened, model: PreTrainedModel, progress: Progress) -> SampleAnswers:
    """What writes answers to the first rows of the evaluation data."""
    file = LinesFile(Path(config.output_dir) / SAMPLES, progress.step)
    mixed = opened.hardware.dtype if config.method == "full" or config.modules_to_save else None
    asked = opened.data.evaluation[: config.eval_samples]
    return SampleAnswers(file, model, opened.template, asked, context_length(opened.folder), mixed)


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
    config: TrainConfig, opened: Opened, settings: dict[str, Any], result: Result, finished: Finished | None
) -> Record:
    """What the run says of itself; `finished` is the shorter run that it extended."""
    return Record(
        method=config.method,
        base_model=config.model_name_or_path,
        base_fingerprint=fingerprint(opened.folder),
        system_prompt=config.system_prompt,
        prompt_style=opened.data.style,
        stop_ids=sorted(opened.template.stop_ids),
        settings=settings,
        results={
            **asdict(result),
            "evaluation_data": opened.data.evaluation_hash,
            "inputs": opened.inputs,
            **(finished.results() if finished else {}),
            **({"lost_output": lost} if (lost := lost_output()) else {}),
        },
        versions=versions(),
    )


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
        finished = run_loop(work, limits, processes, emit, progress)
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
    kept = "" if best is None else f", at step {best:,}, which was the best"
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
    lines += [f"Not all messages were shown ({lost})." for lost in lost_output()]
    if config.method != "full" and _is_gguf(config):
        lines.append(
            "PEFT opens it by the converted copy of the .gguf file, which is on this machine alone. Before you publish "
            "the adapter, put the model's name on its hub into adapter_config.json (base_model_name_or_path)."
        )
    lines += [f"Result: {config.output_dir}", f"Talk to it: {talk}"]
    return "\n".join(lines)
