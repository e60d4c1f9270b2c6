"""A model's safetensors files copied with some of their tensors changed, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qingtune.errors import UserError
from qingtune.files import flush, write_json
from qingtune.models.source import read_header

INDEX = "model.safetensors.index.json"


def copy_changed(
    folder: Path, target: Path, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Copy a model's weights into a folder that exists; of the tensors named, the changed ones, in their own dtype.

    All else stays byte for byte. Peak memory is a few times the largest changed tensor.

    Args:
        change: a tensor's name and the tensor -> one of the same shape.

    Raises:
        UserError: a changed value is too large for the dtype.
    """
    for path in sorted(folder.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        header, start = read_header(path)
        with (target / path.name).open("r+b") as file:
            for name in sorted(names & header.keys(), key=lambda name: header[name]["data_offsets"]):
                file.seek(start + header[name]["data_offsets"][0])
                file.write(_changed_bytes(path, name, change))
        flush(target / path.name)
    if (folder / INDEX).exists():
        shutil.copyfile(folder / INDEX, target / INDEX)


def _changed_bytes(path: Path, name: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> memoryview:
    with safe_open(path, "pt") as file:
        before = file.get_tensor(name)
        after = change(name, before).to(before.dtype).contiguous()
    if not bool(torch.isfinite(after).all()):
        raise UserError(
            f"{name} holds values after merging that are no numbers in {str(after.dtype).removeprefix('torch.')}",
            where=str(path),
            fix="Use a base in bfloat16 or float32, and check the adapter.",
        )
    return after.view(-1).view(torch.uint8).numpy().data


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Put one more tensor into a copied model, in a file of its own."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    else:  # a file of the usual name would be read alone
        (only,) = files
        files = [only.rename(folder / "model-00001-of-00002.safetensors")]
        index = {"metadata": {}, "weight_map": dict.fromkeys(read_header(files[0])[0], files[0].name)}
    own = "model-head.safetensors"
    save_file({name: tensor.contiguous()}, folder / own, metadata={"format": "pt"})
    flush(folder / own)
    index["weight_map"][name] = own
    write_json(folder / INDEX, index)
