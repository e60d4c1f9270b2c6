"""What an earlier run in output_dir means for this one: finished, resumable, or a conflict."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.config.training import TrainConfig
from qingtune.errors import UserError, shorten
from qingtune.files.digests import MANIFEST, sha256_of, why_not_whole
from qingtune.output.console import say
from qingtune.output.units import counted
from qingtune.runs.folder import refuse_files_in_the_way
from qingtune.runs.record import RECORD, Record, differences, read_record, versions
from qingtune.training.checkpoint import State, checkpoints, load_checkpoint, read_state, to_go_on_from
from qingtune.training.finished import START_OVER
from qingtune.training.optim import make_schedule, warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHOOSE = ("auto", "last")
LENGTH = ("max_steps", "num_train_epochs")  # settings by which a finished run may be extended


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        settings: what decides its result, from record.settings_to_compare.
        done: output_dir holds its result already.
        checkpoint: to resume from; None to start at the first step.
        manifest: SHA-256 of the checkpoint's manifest.
        extended: for the record of a finished run that is extended by more steps: after how many, each time, and
            whether a run of the new length would have had the same learning rates until then.
    """

    settings: dict[str, Any]
    done: bool = False
    checkpoint: Path | None = None
    manifest: str | None = None
    extended: Sequence[Mapping[str, Any]] = ()


def choose_start(config: TrainConfig, settings: dict[str, Any], total_steps: int) -> Start:
    """How this run starts, by what output_dir holds on this process's disk.

    Args:
        settings: what decides the run's result, from record.settings_to_compare.
        total_steps: that the settings ask for.

    Raises:
        UserError: what output_dir holds is in the way, or cannot be resumed.
    """
    record, extended, finished = _finished_run(config, settings, total_steps), list[Mapping[str, Any]](), None
    if record:
        finished = _steps_of(record)
        if finished in (0, total_steps):
            return Start(settings, done=True)
        refuse_files_in_the_way(Path(config.output_dir))
        same = _same_rates(config, finished, total_steps)
        extended = [*(record.results.get("extended") or []), {"after_steps": finished, "as_if_never_stopped": same}]
        length = counted(finished, "step")
        say(f"The run in {config.output_dir} is finished after {length}; continuing to {total_steps:,}.")
        if not same:
            say(
                f"Warning: its learning rate ({config.lr_scheduler_type}) was planned for {length}. From "
                f"here on it is that of a run of {total_steps:,} steps, so the result is not that of one run of this "
                "length; the record says so. lr_scheduler_type constant does not depend on the length."
            )
    folder = _where_to_go_on(config, settings, finished)
    return Start(settings, False, folder, sha256_of(folder / MANIFEST) if folder else None, extended)


def check_start(start: Start, settings: dict[str, Any]) -> None:
    """Make sure that this process, by its own settings, can start as the first one chose.

    Raises:
        UserError: it has other data, another model or other settings, or it cannot read the checkpoint.
    """
    if changed := differences(start.settings, settings):
        raise UserError(f"process 0 trains on something else: {'; '.join(changed)}", fix="Give all the same files.")
    folder = start.checkpoint
    if folder is None:
        return
    fix = "Put output_dir on a disk that all processes share, or copy the checkpoint there."
    try:
        read_state(folder)
    except UserError as error:
        what = f"process 0 resumes from this checkpoint, but this process cannot read it ({error.what})"
        raise UserError(what, where=str(folder), fix=fix) from error
    if sha256_of(folder / MANIFEST) != start.manifest:
        raise UserError("process 0 resumes from another checkpoint of this name", where=str(folder), fix=fix)


def _finished_run(config: TrainConfig, settings: dict[str, Any], total_steps: int) -> Record | None:
    """The finished run in output_dir, of these settings or of a smaller number of steps; None if there is none.

    Raises:
        UserError: it holds another run's result, which must not be replaced unasked.
    """
    output_dir = Path(config.output_dir)
    record = None if config.overwrite_output_dir or not output_dir.is_dir() else read_record(output_dir)
    if record is None:
        return None
    if config.resume_from_checkpoint is False:
        raise UserError("output_dir contains a finished run", where=str(output_dir), fix=START_OVER)
    may_differ = LENGTH if 0 < _steps_of(record) <= total_steps else ()
    _check_same_settings(output_dir, record.settings, settings, may_differ)
    return record


def _steps_of(record: Record) -> int:
    return int(record.results.get("steps") or 0)


def _same_rates(config: TrainConfig, steps: int, total_steps: int) -> bool:
    """Whether the learning rates of the first steps are the same in a run of these and of all steps."""
    assert config.learning_rate is not None
    shorter, longer = (
        make_schedule(config.lr_scheduler_type, config.learning_rate, warmup_steps(config, total), total)
        for total in (steps, total_steps)
    )
    return all(shorter(step) == longer(step) for step in range(steps))


def check_checkpoint_exists(config: TrainConfig) -> None:
    """Look for the checkpoint that the user names before anything is loaded.

    Raises:
        UserError: it is not there.
    """
    wish = config.resume_from_checkpoint
    if isinstance(wish, str) and wish not in _CHOOSE and not os.path.isdir(wish):
        raise UserError(
            "there is no such checkpoint (resume_from_checkpoint)", where=shorten(wish), fix="Pass a folder, or auto."
        )


def what_is_left(config: TrainConfig, again: str) -> str:
    """What Ctrl-C left of a run that it ended at once; empty where the files may be an earlier run's.

    `again` resumes the run.
    """
    output_dir = Path(config.output_dir)
    steps = checkpoints(output_dir)
    if not steps and not (output_dir / RECORD).exists():
        return "Interrupted before the first checkpoint: nothing was saved. Run the same command to start again."
    if steps and not config.overwrite_output_dir:
        return f"Interrupted: the checkpoint of step {max(steps)} is kept. To resume: {again}"
    return ""


def _where_to_go_on(config: TrainConfig, settings: dict[str, Any], finished: int | None) -> Path | None:
    """The checkpoint to resume from, None to start from the beginning; `finished`: steps of a run that is extended.

    Raises:
        UserError: it is not a checkpoint, or of a run with other settings, or a newer checkpoint is broken.
    """
    wish = config.resume_from_checkpoint
    if isinstance(wish, str) and wish not in _CHOOSE:
        folder = Path(wish)
        state = read_state(folder)
    else:
        found = [] if config.overwrite_output_dir else to_go_on_from(Path(config.output_dir))
        if not found and finished:
            raise UserError(
                f"the run is finished after {counted(finished, 'step')}, "
                "and without a checkpoint it cannot be extended",
                where=config.output_dir,
                fix=f"{START_OVER} save_strategy steps or epoch keeps a checkpoint of the last step.",
            )
        if not found:
            return None
        if wish is False:
            raise UserError("output_dir contains a run that can be resumed", where=config.output_dir, fix=START_OVER)
        folder, state = _first_whole(found)
    _check_same_settings(folder, state.settings, settings, LENGTH if finished else ())
    say(f"Resuming from {folder}.")
    if changed := differences(state.versions, versions()):
        say(f"Warning: numbers may differ slightly from now on: {'; '.join(changed)}.")
    return folder


def _first_whole(found: Sequence[Path]) -> tuple[Path, State]:
    """The first intact checkpoint; broken ones are reported and skipped."""
    for folder in found:
        try:
            return folder, read_state(folder)
        except UserError as error:
            say(f"Warning: checkpoint skipped. {error.where}: {error.what}.")
    raise UserError(
        f"none of the {len(found)} checkpoints is complete, so the run cannot resume",
        where=str(found[0].parent),
        fix=START_OVER,
    )


def _check_same_settings(
    place: Path, before: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    # A setting that the version of then did not have was at its default.
    newer = {name: field.default for name, field in TrainConfig.model_fields.items() if name in now}
    passed_over = {name: now[name] for name in may_differ}
    if changed := differences({**newer, **before, **passed_over}, now):
        listing = "".join(f"\n  {line}" for line in changed)
        raise UserError(f"this run was started with different settings:{listing}\n{START_OVER}", where=str(place))


def load_best(output_dir: Path, model: PreTrainedModel, step: int, eval_loss: float | None) -> None:
    """Give the model the weights of its best evaluation, which came after this step; the loop saved them then."""
    best = checkpoints(output_dir).get(step)
    if best is None:  # the run began without load_best_model_at_end
        say(f"Step {step} had the best evaluation but was not saved; the result is the last step.")
        return
    if reason := why_not_whole(best):
        say(f"Warning: {best}, the best evaluation, is broken ({reason}); the result is the last step.")
        return
    load_checkpoint(best, {name: p for name, p in model.named_parameters() if p.requires_grad}, None)
    say(f"The result is step {step}, the best evaluation ({eval_loss:.4f}).")
