"""What an earlier run in output_dir means for this one: finished, to be gone on with, or in the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qingtune.config import TrainConfig
from qingtune.data.prepare import Say
from qingtune.errors import UserError
from qingtune.record import differences, read_record
from qingtune.training.checkpoint import checkpoints, load_checkpoint, read_state
from qingtune.training.loop import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def where_to_go_on(config: TrainConfig, settings: dict[str, Any], say: Say) -> Path | None:
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
    _same_settings(checkpoint, read_state(checkpoint)[1], settings)
    say(f"Going on from {checkpoint}.")
    return checkpoint


def _same_settings(place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := differences(before, now):
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
    load_checkpoint(best.folder, {name: p for name, p in model.named_parameters() if p.requires_grad}, None)
    say(f"The result is step {progress.best_step}, the best evaluation ({progress.best_loss:.4f}).")
