"""The processes of a run and its trackers, through Accelerate: one process, or several that a launcher started."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import broadcast_object_list, gather_object

from qingtune.errors import UserError, reason_of
from qingtune.machine.describe import launched_processes
from qingtune.training.events import Event, as_metrics

T = TypeVar("T")


class Processes:
    """Sums, barriers and trackers over the processes that the launcher started."""

    def __init__(self, trackers: Sequence[str] | None, output_dir: Path) -> None:
        """Join the other processes.

        Raises:
            UserError: a tracker is unknown or not installed, or a launcher's variables cannot be used.
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

    def by_first(self, action: Callable[[], T]) -> T:
        """What an action returns in the first process, in every process: only the first one runs it.

        Raises:
            UserError: it failed in the first process, so that all end; that one raises the error itself.
        """
        if self.count == 1:
            return action()
        result, error = _attempt(action) if self.index == 0 else (None, None)
        shared: list[Any] = [result, error and reason_of(error)]
        broadcast_object_list(shared)
        if error:
            raise error
        result, reason = shared
        if reason:
            raise UserError(f"process 0 failed: {reason}")
        return cast("T", result)

    def by_all(self, action: Callable[[], T]) -> T:
        """What an action returns in this process, once it has succeeded in all of them.

        Raises:
            UserError: it failed in another process, so that all end; one where it failed raises the error itself.
        """
        if self.count == 1:
            return action()
        result, error = _attempt(action)
        failures = gather_object([(self.index, reason_of(error))] if error else [])
        if error:
            raise error
        for index, reason in failures:
            raise UserError(f"process {index} failed: {reason}")
        return cast("T", result)

    def track(self, event: Event) -> None:
        """Send a measurement to the trackers, which are started with the first one."""
        metrics = as_metrics(event)
        if metrics is None or not self._wanted:
            return
        if not self._tracking:
            self._accelerator.init_trackers("qingtune")
            self._tracking = True
        self._accelerator.log(metrics, step=metrics.pop("step"))

    def finish(self) -> None:
        """Close the trackers and leave the process group."""
        self._accelerator.end_training()


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an action returns, or the error that ends this process once the others know of it."""
    try:
        return action(), None
    except Exception as error:
        return None, error


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
