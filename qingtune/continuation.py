"""What an earlier run in output_dir means for this one: finished, to be gone on with, or in the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.config import TrainConfig
from qingtune.data.prepare import Say
from qingtune.errors import UserError, shorten
from qingtune.files import why_not_whole
from qingtune.record import differences, read_record, versions
from qingtune.training.checkpoint import Checkpoint, State, checkpoints, load_checkpoint, read_state, to_go_on_from
from qingtune.training.loop import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHOOSE = ("auto", "last")
ANEW = "Pass --overwrite_output_dir to train anew, or choose another output_dir."


def is_finished(config: TrainConfig, settings: dict[str, Any], say: Say) -> bool:
    """Whether output_dir holds the result of this very run, so that nothing is left to do.

    Args:
        settings: what decides the run's result, from record.settings_to_compare.

    Raises:
        UserError: it holds another run's result, which must not be replaced unasked.
    """
    output_dir = Path(config.output_dir)
    record = None if config.overwrite_output_dir or not output_dir.is_dir() else read_record(output_dir)
    if record is None:
        return False
    if config.resume_from_checkpoint is False:
        raise UserError("output_dir holds a finished run", where=str(output_dir), fix=ANEW)
    _same_settings(output_dir, record.settings, settings)
    say(f"This run is finished already; its result is in {output_dir}. {ANEW}")
    return True


def check_checkpoint_exists(config: TrainConfig) -> None:
    """Look for the checkpoint that the user names before anything is loaded.

    Raises:
        UserError: it is not there.
    """
    wish = config.resume_from_checkpoint
    if isinstance(wish, str) and wish not in _CHOOSE and not os.path.isdir(wish):
        raise UserError(
            "there is no such checkpoint (resume_from_checkpoint)", where=shorten(wish), fix="Name a folder, or auto."
        )


def where_to_go_on(config: TrainConfig, settings: dict[str, Any], say: Say) -> Path | None:
    """The checkpoint to go on from; None to start anew.

    Raises:
        UserError: the checkpoint is none, or of a run with other settings, or must not be passed over unasked.
    """
    wish = config.resume_from_checkpoint
    if isinstance(wish, str) and wish not in _CHOOSE:
        folder = Path(wish)
        state = read_state(folder)
    else:
        found = [] if config.overwrite_output_dir else to_go_on_from(Path(config.output_dir))
        if not found:
            return None
        if wish is False:
            raise UserError("output_dir holds a run that can go on", where=config.output_dir, fix=ANEW)
        folder, state = _first_whole(found, say)
    _same_settings(folder, state.settings, settings)
    say(f"Going on from {folder}.")
    if changed := differences(state.versions, versions()):
        say(f"Warning: numbers may differ a little from here on: {'; '.join(changed)}.")
    return folder


def _first_whole(found: Sequence[Checkpoint], say: Say) -> tuple[Path, State]:
    """The first checkpoint that is as it was written; those that are not are told and passed over."""
    for checkpoint in found:
        try:
            return checkpoint.folder, read_state(checkpoint.folder)
        except UserError as error:
            say(f"Warning: passed over. {error.where}: {error.what}.")
    raise UserError(
        f"none of the {len(found)} checkpoints is whole, so the run cannot go on",
        where=str(found[0].folder.parent),
        fix=ANEW,
    )


def _same_settings(place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # A setting that the version of then did not have was at its default.
    newer = {name: field.default for name, field in TrainConfig.model_fields.items() if name in now}
    if changed := differences({**newer, **before}, now):
        listing = "".join(f"\n  {line}" for line in changed)
        raise UserError(f"this run was started with other settings:{listing}\n{ANEW}", where=str(place))


def load_best(output_dir: Path, model: PreTrainedModel, progress: Progress, say: Say) -> None:
    """Give the model the weights of its best evaluation; the loop saved them when they came."""
    if progress.best_step in (None, progress.step):
        return
    best = next((checkpoint for checkpoint in checkpoints(output_dir) if checkpoint.step == progress.best_step), None)
    if best is None:  # the run began without load_best_model_at_end
        say(f"Step {progress.best_step} evaluated best but was not saved then; the result is the last step.")
        return
    if reason := why_not_whole(best.folder):
        say(f"Warning: {best.folder}, the best evaluation, is broken ({reason}); the result is the last step.")
        return
    load_checkpoint(best.folder, {name: p for name, p in model.named_parameters() if p.requires_grad}, None)
    say(f"The result is step {progress.best_step}, the best evaluation ({progress.best_loss:.4f}).")
