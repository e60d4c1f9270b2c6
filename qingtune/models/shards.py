"""A model's safetensors files: copied with some of their tensors changed, one in memory at a time, or rewritten."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qingtune.errors import UserError
from qingtune.files.json_files import INDEX_BYTES, read_object
from qingtune.files.weights_file import FLOATS, INDEX, WHOLE, Tensor, read_header, weight_files
from qingtune.files.write import flush, replacing, write_json

SHARD_BYTES = 1 << 29  # of the files that ShardWriter makes, at least
Change = Callable[[str, torch.Tensor], torch.Tensor]  # a tensor's name and the tensor -> one of the same shape


def copy_changed(folder: Path, target: Path, names: Collection[str], change: Change) -> None:
    """Copy a model's weights into a folder that exists; of the tensors named, the changed ones, in their own dtype.

    All else stays byte for byte. Peak memory is a few times the largest changed tensor.
    A UserError if a changed value is too large for the dtype.
    """
    for path in weight_files(folder):
        shutil.copyfile(path, target / path.name)
        header, start = read_header(path)
        with (target / path.name).open("r+b") as file:
            for name in sorted(names & header.keys(), key=lambda name: header[name].start):
                file.seek(start + header[name].start)
                file.write(_changed_bytes(path, name, change))
        flush(target / path.name)
    if (folder / INDEX).exists() and not (folder / WHOLE).exists():
        shutil.copyfile(folder / INDEX, target / INDEX)


def _changed_bytes(path: Path, name: str, change: Change) -> memoryview:
    with safe_open(path, "pt") as file:
        before = file.get_tensor(name)
        after = rounded(name, change(name, before), before.dtype, path)
    return _bytes_of(after)


def convert_changed(folder: Path, target: Path, names: Collection[str], change: Change, dtype: torch.dtype) -> None:
    """Write a model's weights into a folder that exists, those named as they are changed, all numbers in one dtype.

    Files keep their names and tensors; whole numbers, such as counters, stay as they are. Peak memory is a few times
    the largest tensor. A UserError if a value is too large for the dtype.
    """
    total = 0
    for path in weight_files(folder):
        header, _ = read_header(path)
        converted = _converted_header(header, dtype)
        with replacing(target / path.name) as file, safe_open(path, "pt") as tensors:
            file.write(_header_bytes(converted))
            for name in converted:
                before = tensors.get_tensor(name)
                after = change(name, before) if name in names else before
                kept = rounded(name, after, dtype, path) if header[name].dtype in FLOATS else after
                total += file.write(_bytes_of(kept))
    if not (folder / WHOLE).exists():
        index = read_object(folder / INDEX, INDEX_BYTES)
        write_json(target / INDEX, {**index, "metadata": {**(index.get("metadata") or {}), "total_size": total}})


_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _converted_header(header: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """A safetensors file's entries in their order, with floating tensors in another dtype and places to match."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1].start):
        start, floating = end, tensor.dtype in FLOATS
        end = start + (math.prod(tensor.shape) * dtype.itemsize if floating else tensor.end - tensor.start)
        kind = _SAFETENSORS_NAMES[dtype] if floating else tensor.dtype
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return entries


def _header_bytes(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype, where: Path) -> torch.Tensor:
    """A tensor in the dtype that it is to be stored in; a UserError if a value is too large for that."""
    after = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(after).all()):
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name} contains values that are not numbers", where=str(where), fix="Check the base and the adapter."
            )
        largest, most = float(tensor.abs().max()), torch.finfo(dtype).max
        raise UserError(
            f"{name} contains values up to {largest:.6g}, but {str(dtype).removeprefix('torch.')} ends at {most:.6g}",
            where=str(where),
            fix="Store the model in bfloat16 or float32: --save_dtype, without --save_in_4bit.",
        )
    return after


class ShardWriter:
    """Writes tensors into a folder without weights, in files of about SHARD_BYTES, which is what is held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one more tensor."""
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        """Write the rest, and give the files their names."""
        if self._held:
            self._write()
        count = len(self._files)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        if count > 1:
            places = {tensor: name for tensors, name in zip(self._files, names, strict=True) for tensor in tensors}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": places})

    def _write(self) -> None:
        path = self._part(len(self._files))
        save_file(self._held, path, metadata={"format": "pt"})
        flush(path)
        self._files.append(list(self._held))
        self._total += self._bytes
        self._held, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Put one more tensor into a copied model, in a separate file."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        index = read_object(folder / INDEX, INDEX_BYTES)
    else:  # a file of the usual name would be read alone
        (only,) = files
        files = [only.rename(folder / "model-00001-of-00002.safetensors")]
        index = {"metadata": {}, "weight_map": dict.fromkeys(read_header(files[0])[0], files[0].name)}
    own = "model-head.safetensors"
    save_file({name: tensor.contiguous()}, folder / own, metadata={"format": "pt"})
    flush(folder / own)
    index["weight_map"][name] = own
    write_json(folder / INDEX, index)
