"""Checkpoints: safetensors and JSON, written whole or not at all; and how a run resumes from one.

Layout of `checkpoint-<step>/`: weights.safetensors (what is trained), optimizer.safetensors (its states, named
`parameter::state`), state.json (progress, settings, versions), metrics.jsonl (so far), manifest.json (size and SHA-256
of each). A sharded run has the first two in parts, one for each process (part_files.py). Nothing is pickled. Random
states and the place in the data need no saving: they are functions of seed and step.

A checkpoint is written to a temporary folder, flushed, hashed into its manifest and renamed into place; then
latest_checkpoint.json is moved to it; only then are old ones removed. A process killed anywhere in between leaves
either the previous checkpoint or the new one to resume from, and temporary folders that the next start removes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from qingtune.errors import UserError
from qingtune.files.digests import why_not_whole, write_manifest
from qingtune.files.foreign import foreign_files
from qingtune.files.json_files import INDEX_BYTES, OBJECT, check_fields, list_of, number, read_object, whole
from qingtune.files.staging import move_into_place, staging_folder
from qingtune.files.write import copy_file, disk_errors, write_json
from qingtune.runs.record import LATEST, METRICS
from qingtune.training.events import Stepped
from qingtune.training.loop import Progress
from qingtune.training.part_files import PartFiles, Rows, check_parts, part_name
from qingtune.training.processes import Processes

WEIGHTS, OPTIMIZER = "weights", "optimizer"  # stems of the files of tensors
_NAME = "checkpoint-"
_COUNT = whole(0)
_PAGED = ("state1", "state2")  # of bitsandbytes' optimizers
_SCALER = {
    "scale": number(above=0), "growth_factor": number(above=0), "backoff_factor": number(above=0),
    "growth_interval": whole(1), "_growth_tracker": _COUNT,
}  # fmt: skip
_PROGRESS = {"best_step": _COUNT, "best_loss": number(), "unlogged": list_of(OBJECT)}


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The folders of the checkpoints in a run's folder, whole or not, by step, in order; the clock has no say."""
    found = {folder.name.removeprefix(_NAME): folder for folder in output_dir.glob(f"{_NAME}*") if folder.is_dir()}
    return dict(sorted((int(step), folder) for step, folder in found.items() if step.isascii() and step.isdecimal()))


def to_go_on_from(output_dir: Path) -> list[Path]:
    """The checkpoints that a run may resume from, best choice first: the latest, then earlier ones.

    Checkpoints after the latest one were abandoned when the run was resumed from an earlier checkpoint.
    """
    found = checkpoints(output_dir)
    try:
        name = read_object(output_dir / LATEST)["folder"]
    except (UserError, FileNotFoundError, KeyError):  # cut off before the first move, or broken: the steps tell too
        name = None
    latest = next((step for step, folder in found.items() if folder.name == name), math.inf)
    return [folder for step, folder in reversed(found.items()) if step <= latest]


def save_checkpoint(
    output_dir: Path,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write a checkpoint and move the pointer to it.

    Args:
        scaler: of a run in fp16; its scale is saved too.

    Raises:
        UserError: the disk does not take it; what was there before is as it was.
    """
    folder = output_dir / f"{_NAME}{progress.step}"
    with _disk_errors(folder), staging_folder(folder) as half_done:
        save_file(
            {name: _plain(parameter) for name, parameter in trained.items()}, half_done / f"{WEIGHTS}.safetensors"
        )
        tensors, scalars = _optimizer_state(trained, optimizer)
        save_file(tensors, half_done / f"{OPTIMIZER}.safetensors")
        state = {
            "progress": _progress_to_json(progress), "optimizer_scalars": scalars, "settings": dict(settings),
            "versions": dict(versions), "scaler": scaler.state_dict() if scaler else {},
        }  # fmt: skip
        _finish(half_done, folder, state)
    return folder


def save_parts(
    output_dir: Path,
    trained: Mapping[str, torch.nn.Parameter],
    rows: Mapping[str, Rows],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    processes: Processes,
) -> None:
    """Write a checkpoint of a sharded run, each process its part, and move the pointer to it; all processes call this.

    Args:
        trained: what is trained, as far as this process holds it.
        rows: which rows it holds of what is sharded; all else is written by the first process.

    Raises:
        UserError: the disk does not take it, or not all processes write to the same one; in all processes.
    """
    folder = output_dir / f"{_NAME}{progress.step}"

    def write(half_done: Path) -> dict[str, Any]:
        mine = {name: parameter for name, parameter in trained.items() if name in rows or processes.index == 0}
        tensors, scalars = _optimizer_state(mine, optimizer)
        if processes.index:  # such as the number of steps, which is the same in all of them
            tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
        weights = {name: _plain(parameter) for name, parameter in mine.items()}
        with _disk_errors(folder):
            for stem, content in ((WEIGHTS, weights), (OPTIMIZER, tensors)):
                save_file(content, half_done / part_name(stem, processes.index, processes.count))
        return scalars

    def finish(half_done: Path, scalars: dict[str, Any]) -> None:
        check_parts(half_done, (WEIGHTS, OPTIMIZER), processes.count)
        state = {
            "progress": _progress_to_json(progress), "optimizer_scalars": scalars, "settings": dict(settings),
            "versions": dict(versions), "scaler": {},
        }  # fmt: skip
        with _disk_errors(folder):
            _finish(half_done, folder, state)

    def begin() -> Path:
        with _disk_errors(folder):
            return stack.enter_context(staging_folder(folder))

    with ExitStack() as stack:
        half_done = processes.by_first(begin)
        scalars = processes.by_all(lambda: write(half_done))
        processes.by_first(lambda: finish(half_done, scalars))


def _disk_errors(folder: Path) -> AbstractContextManager[None]:
    return disk_errors(folder.name, folder.parent, "Free disk space; earlier checkpoints are intact.")


def _finish(half_done: Path, folder: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint whose tensors are written into its place, and move the pointer to it."""
    write_json(half_done / "state.json", state)
    if (folder.parent / METRICS).exists():
        copy_file(folder.parent / METRICS, half_done / METRICS)
    write_manifest(half_done)
    remove(folder)  # broken, or of a way that the run left
    move_into_place(half_done, folder)
    write_json(folder.parent / LATEST, {"folder": folder.name})


def remove(folder: Path) -> None:
    """Remove a folder so that no half of it is ever taken for a checkpoint."""
    if not folder.exists():
        return
    with staging_folder(folder) as aside:
        os.rename(folder, aside / folder.name)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _optimizer_state(
    trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Each parameter's states by name, tensors or not."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    storages: set[int] = set()
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensor = _plain(value)
                storage = tensor.untyped_storage()
                # safetensors takes no shared storage; copying all would hold the largest part of full training twice.
                if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
                    tensor = tensor.clone()
                storages.add(tensor.untyped_storage().data_ptr())
                tensors[f"{name}::{key}"] = tensor
            else:
                scalars[f"{name}::{key}"] = value
    return tensors, scalars


def _progress_to_json(progress: Progress) -> dict[str, Any]:
    best_loss = None if math.isinf(progress.best_loss) else progress.best_loss
    return {**dataclasses.asdict(progress), "best_loss": best_loss}


def _progress_from_json(values: dict[str, Any]) -> Progress:
    for name in ("step", "bad_steps"):
        if not _COUNT.fits(values[name]):
            raise ValueError(f"{name} is not {_COUNT.wanted}")
    check_fields(values, _PROGRESS, "progress")
    best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
    unlogged = [Stepped(**step) for step in values["unlogged"]]
    return dataclasses.replace(Progress(**values), best_loss=best_loss, unlogged=unlogged)


@dataclass(frozen=True)
class State:
    """The content of a checkpoint except its tensors."""

    progress: Progress
    settings: dict[str, Any]
    versions: dict[str, str]


def parse_state(folder: Path) -> State:
    """The same as read_state of a checkpoint known to be whole: hashing gigabytes once a start is enough."""
    state = _read_state_file(folder)
    return State(_progress_from_json(state["progress"]), dict(state["settings"]), dict(state["versions"]))


def read_state(folder: Path) -> State:
    """A checkpoint's progress, the settings it was made with, and the versions.

    Raises:
        UserError: this is no checkpoint, or not a whole one.
    """
    reason = why_not_whole(folder)
    try:
        if reason is None:
            return parse_state(folder)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"not a complete checkpoint: {reason}", where=str(folder), fix="Name another one.")


def load_checkpoint(
    folder: Path,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> None:
    """Load weights, and the optimizer's and the scaler's states if these are given, in place.

    rows: which rows this process holds of what is sharded, by name.
    """
    others = UserError("the checkpoint has different parameters than this run trains", where=str(folder))
    rows = rows or {}
    shapes = {name: _whole_shape(parameter, rows.get(name)) for name, parameter in trained.items()}
    weights = PartFiles(folder, WEIGHTS)
    if weights.shapes != shapes:
        raise others
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights.read(name, rows.get(name)))
    if optimizer is None:
        return
    state, tensors = _read_state_file(folder), PartFiles(folder, OPTIMIZER)
    scalars: dict[str, Any] = state.get("optimizer_scalars") or {}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name in (*tensors.shapes, *scalars):
        parameter, _, key = name.partition("::")
        if parameter not in trained:
            raise others
        owner = trained[parameter]
        value = scalars[name] if name in scalars else tensors.read_state(name, shapes[parameter], rows.get(parameter))
        optimizer.state[owner][key] = _in_its_place(key, value, owner, optimizer, groups[owner])
    if scaler and scaler.is_enabled() and (scale := state.get("scaler")):  # none in checkpoints of 0.1.0
        where = folder / "state.json"
        check_fields(state, {"scaler": OBJECT}, str(where))
        check_fields(scale, _SCALER, f"scaler in {where}")
        with foreign_files("the scale of the loss cannot be loaded", where):
            scaler.load_state_dict(scale)


def _in_its_place(
    key: str, value: Any, owner: torch.nn.Parameter, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> Any:
    """A parameter's state where the optimizer itself would have made it.

    That is the parameter's device, but for two: a step that PyTorch's optimizers read on the CPU at every update
    (torch.optim.Optimizer.load_state_dict has the same rule), and bitsandbytes' paged states, which may leave the GPU.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value
    if key in _PAGED and getattr(optimizer, "is_paged", False):
        return cast("Any", optimizer).get_state_buffer(owner, dtype=value.dtype).copy_(value)
    return value.to(owner.device)


def _whole_shape(parameter: torch.Tensor, rows: Rows | None) -> tuple[int, ...]:
    return tuple(parameter.shape) if rows is None else (rows.count, *parameter.shape[1:])


def _read_state_file(folder: Path) -> dict[str, Any]:
    return read_object(folder / "state.json", INDEX_BYTES, nan=True)


def prune(output_dir: Path, keep: int | None, progress: Progress) -> None:
    """Remove the oldest checkpoints beyond `keep`, never the newest one nor the best; later ones are not this run's.

    Raises:
        UserError: the disk does not let them go.
    """
    if keep is None:
        return
    older = {step: folder for step, folder in checkpoints(output_dir).items() if step < progress.step}
    spare = [folder for step, folder in older.items() if step != progress.best_step]
    with disk_errors("the removal of old checkpoints", output_dir, "Remove them yourself."):
        for folder in spare[: max(0, len(spare) + 1 - keep)]:  # the newest one counts
            remove(folder)
