"""The processes of a run and its trackers, through Accelerate: one process, or several that a launcher started."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from qingtune.errors import UserError
from qingtune.machine.describe import launched_processes
from qingtune.training.events import Event, Noted, as_metrics


class AcceleratedProcesses:
    """Sums, barriers and trackers over the processes that the launcher started."""

    def __init__(self, trackers: Sequence[str] | None, output_dir: Path) -> None:
        """Join the other processes.

        Raises:
            UserError: a tracker is unknown or not installed, or a launcher's variable is no whole number.
        """
        launched_processes()
        names = _check_trackers(trackers or [])
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
            log_with=cast("Any", names or None),
            project_dir=str(output_dir / "trackers"),
        )
        self._tracking = False
        self._wanted = bool(names)
        self.index: int = self._accelerator.process_index
        self.local_index: int = self._accelerator.local_process_index
        self.count: int = self._accelerator.num_processes

    def main_first(self) -> AbstractContextManager[None]:
        """Let the main process go first, as where a file is made that the others then find."""
        return self._accelerator.main_process_first()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return tensor
        on_device = tensor.to(self._accelerator.device)
        return cast("torch.Tensor", self._accelerator.reduce(on_device, "sum")).to(tensor.device)

    def wait(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    def track(self, event: Event) -> None:
        """Send a measurement to the trackers, which are started with the first one."""
        if isinstance(event, Noted) or not self._wanted:
            return
        if not self._tracking:
            self._accelerator.init_trackers("qingtune")
            self._tracking = True
        metrics = dict(as_metrics(event) or {})
        step = int(metrics.pop("step"))
        self._accelerator.log(metrics, step=step)

    def finish(self) -> None:
        """Close the trackers and leave the process group."""
        self._accelerator.end_training()


def _check_trackers(names: Sequence[str]) -> list[str]:
    known = {str(kind) for kind in LOGGER_TYPE_TO_CLASS}
    if "all" in names:
        return [name for name in sorted(known) if importlib.util.find_spec(name)]
    for name in names:
        if name not in known:
            raise UserError(
                f'"{name}" is not a tracker', where="report_to", fix=f"There are {', '.join(sorted(known))}, all, none."
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"the tracker {name} is not installed", where="report_to", fix=f"pip install {name}, or leave it out."
            )
    return list(names)
