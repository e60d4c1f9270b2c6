"""A multimodal checkpoint written with its text as it was trained, and all else as it is in the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qingtune.files.weights_file import weight_files
from qingtune.files.write import copy_file, write_json
from qingtune.models.config_file import CONFIG, GENERATION, read_model_config
from qingtune.models.multimodal import PROCESSOR
from qingtune.models.shards import copy_changed
from qingtune.models.stored_weights import StoredWeights


def holds_all_of(model: Any, base: Path) -> bool:
    """Whether a checkpoint holds all that a model of its text is made of, and so can be written around it."""
    stored = StoredWeights(base)
    stored.join_experts(model)
    return stored.fit(model)


def bytes_of_whole(base: Path) -> int:
    """What `save_whole` writes of weights."""
    return sum(path.stat().st_size for path in weight_files(base))


def save_whole(model: Any, base: Path, folder: Path) -> None:
    """Write a checkpoint into a folder that exists: the base's files, names and class, the model's numbers in their
    dtypes where it has them, the base's bit for bit where it does not. One tensor is in memory at a time.

    Raises:
        UserError: the base is gone or is another one, or a number is too large for its dtype.
    """
    stored = StoredWeights(base)
    stored.join_experts(model)
    trained: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():  # a tied head too, where the files hold it
        trained |= stored.split(name, tensor)
    names = trained.keys() & set(stored.own_names.values())
    copy_changed(base, folder, names, lambda name, _: trained[name].detach().cpu())
    write_json(folder / CONFIG, read_model_config(base))
    copy_settings(base, folder)


def copy_settings(base: Path, folder: Path) -> None:
    """Copy what a model's folder says of generating and of images, where the other has not got it."""
    for name in (GENERATION, *PROCESSOR):
        if (base / name).exists() and not (folder / name).exists():
            copy_file(base / name, folder / name)
