"""Checkpoints: safetensors and JSON, written whole or not at all; and how a run goes on from one.

Layout of `checkpoint-<step>/`: weights.safetensors (what is trained), optimizer.safetensors (its states, named
`parameter::state`), state.json (progress, settings, versions). Nothing is pickled. Random states need no saving: they
are functions of seed and step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qingtune.errors import UserError
from qingtune.files import move_into_place, staging_folder, write_json
from qingtune.training.loop import Progress

_NAME = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    step: int


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, by step."""
    found = [
        Checkpoint(folder, int(folder.name.removeprefix(_NAME)))
        for folder in output_dir.glob(f"{_NAME}*")
        if folder.name.removeprefix(_NAME).isdigit() and (folder / "state.json").exists()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save_checkpoint(
    output_dir: Path,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
) -> Path:
    """Write everything to a temporary folder, flush it to the disk, then rename it into place."""
    folder = output_dir / f"{_NAME}{progress.step}"
    with staging_folder(folder) as half_done:
        save_file({name: _plain(parameter) for name, parameter in trained.items()}, half_done / "weights.safetensors")
        tensors, scalars = _optimizer_state(trained, optimizer)
        save_file(tensors, half_done / "optimizer.safetensors")
        state = {"progress": _progress_to_json(progress), "optimizer_scalars": scalars, "settings": dict(settings)}
        write_json(half_done / "state.json", state)
        shutil.rmtree(folder, ignore_errors=True)
        move_into_place(half_done, folder)
    return folder


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _optimizer_state(
    trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}::{key}"] = _plain(value).clone()
            else:
                scalars[f"{name}::{key}"] = value
    return tensors, scalars


def _progress_to_json(progress: Progress) -> dict[str, Any]:
    values = dataclasses.asdict(progress)
    values["best_loss"] = None if math.isinf(progress.best_loss) else progress.best_loss
    return values


def read_state(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """A checkpoint's progress and the settings it was made with.

    Raises:
        UserError: this is no checkpoint.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        progress = dict(state["progress"])
        if progress["best_loss"] is None:
            progress["best_loss"] = math.inf
        return Progress(**progress), dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no usable checkpoint ({error})", where=str(folder), fix="Name another one.") from None


def load_checkpoint(
    folder: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> None:
    """Load weights, and the optimizer's states if one is given, in place."""
    weights = load_file(folder / "weights.safetensors")
    if set(weights) != set(trained):
        raise UserError("the checkpoint holds other parameters than this run trains", where=str(folder))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    if optimizer is None:
        return
    values: dict[str, Any] = dict(load_file(folder / "optimizer.safetensors"))
    values |= json.loads((folder / "state.json").read_text(encoding="utf-8"))["optimizer_scalars"]
    for name, value in values.items():
        parameter, _, key = name.partition("::")
        owner = trained[parameter]
        on_device = value.to(owner.device) if isinstance(value, torch.Tensor) else value
        optimizer.state[owner][key] = on_device


def prune(output_dir: Path, keep: int | None, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, never the best one nor the newest."""
    if keep is None:
        return
    spare = [checkpoint for checkpoint in checkpoints(output_dir)[:-1] if checkpoint.step != best_step]
    newest_counts = 1
    for checkpoint in spare[: max(0, len(spare) - (keep - newest_counts))]:
        shutil.rmtree(checkpoint.folder)
