"""Room on the disk: bytes of a run's result and of the checkpoints that it keeps, next to what is free."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from qingtune.config.training import TrainConfig
from qingtune.data.order import Plan


@dataclass(frozen=True)
class DiskPlan:
    """What a run writes to output_dir.

    Attributes:
        result: bytes of the adapter, or of the model.
        checkpoint: bytes of each checkpoint: what is trained, and the optimizer's states.
        checkpoints: how many are there at the worst; None where the length of the run is not known.
        free: bytes; None where the run is planned for another machine.
    """

    result: int
    checkpoint: int
    checkpoints: int | None
    free: int | None

    @property
    def total(self) -> int:
        """Bytes at the worst; where it is not known how many checkpoints there will be, with one of them."""
        return self.result + self.checkpoint * (1 if self.checkpoints is None else self.checkpoints)

    @property
    def fits(self) -> bool | None:
        """Whether that much is free; None where it is unknown."""
        return None if self.free is None else self.total <= self.free


def most_checkpoints(config: TrainConfig, total_steps: int | None, steps_per_epoch: int | None) -> int | None:
    """Checkpoints that lie on the disk at a time, at the worst; None where the length of the run decides.

    Args:
        total_steps: of the run; likewise steps_per_epoch. None where they are not known.
    """

    def times(strategy: str | None, steps: int | None) -> int | None:
        every = {"no": math.inf, "steps": steps, "epoch": steps_per_epoch}[strategy or "no"]
        if every == math.inf:
            return 0
        return math.ceil(total_steps / every) if total_steps and every else None

    saved = times(config.save_strategy, config.save_steps)
    if config.load_best_model_at_end:  # each best evaluation is saved
        evaluated = times(config.eval_strategy, config.eval_steps)
        saved = None if saved is None or evaluated is None else saved + evaluated
    if config.save_total_limit is None:
        return saved
    # The new one is whole before an old one goes, and the best one stays.
    kept = config.save_total_limit + 1 + config.has_evaluation
    return kept if saved is None else min(saved, kept)


def plan_disk(config: TrainConfig, result: int, checkpoint: int, samples: int | None, *, here: bool = True) -> DiskPlan:
    """The plan of a run.

    Args:
        result: bytes on disk; likewise of a checkpoint.
        samples: an epoch's, of one process; None where they are not known.
        here: whether it runs on this machine.
    """
    total = config.max_steps if config.max_steps > 0 else None
    steps_per_epoch = None
    if samples is not None:
        steps_per_epoch = Plan.of(config, samples).steps_per_epoch
        total = total or math.ceil(config.num_train_epochs * steps_per_epoch)
    count = most_checkpoints(config, total, steps_per_epoch)
    return DiskPlan(result, checkpoint, count, free_on_disk(Path(config.output_dir)) if here else None)


def free_on_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
