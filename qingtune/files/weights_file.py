"""Safetensors files and their index, which may come from strangers: headers, checked before any tensor is read.

The format: https://github.com/huggingface/safetensors#format. No torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from qingtune.errors import UserError, shorten
from qingtune.files.json_files import INDEX_BYTES, TEXT, check_fields, object_of, open_plain, parse_object, read_object

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a file. A mixture of 18,432 matrices (Qwen3-30B-A3B) has six times as many tensors in 4 bits; work takes seconds
# for every hundred thousand.
MOST_TENSORS = 150_000
LONGEST_NAME = 1000
# Bytes of a number, by the format's names.
_ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
# Formats of weights and adapters that are computed with; others are codes of weights in few bits.
FLOATS = ("F16", "BF16", "F32", "F64")
# Stored with the weights by older versions of Transformers, as integers or flags.
_NO_WEIGHTS = (".attn.bias", ".attention.bias", ".masked_bias", ".position_ids", ".num_batches_tracked")


class Tensor(NamedTuple):
    """A tensor as a header describes it: the format's name of its numbers, its shape, its bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Tensor], int]:
    """A safetensors file's tensors by name, and where their data starts.

    Raises:
        UserError: the file is missing, or is no whole safetensors file.
    """
    try:
        with open_plain(path) as file:
            size = int.from_bytes(file.read(8), "little")
            data_bytes = os.fstat(file.fileno()).st_size - 8 - size
            if data_bytes < 0 or size > INDEX_BYTES:
                raise ValueError("its header is longer than the file")
            return _tensors(parse_object(file.read(size), str(path)), data_bytes), 8 + size
    except FileNotFoundError:
        raise UserError("there is no such file", where=str(path), fix="Check that the folder is complete.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (UserError, ValueError) as error:
        reason = error.what if isinstance(error, UserError) else str(error)
        raise UserError(
            f"not a complete safetensors file ({reason})", where=str(path), fix="Download it again."
        ) from None


def _tensors(content: dict[str, Any], data_bytes: int) -> dict[str, Tensor]:
    """The tensors of a header, which must lie one behind the other and fill the data."""
    check_fields(content, {"__metadata__": object_of(TEXT)}, "the header")
    content.pop("__metadata__", None)
    if len(content) > MOST_TENSORS:
        raise ValueError(f"it has {len(content):,} tensors")
    tensors = {name: _tensor(name, entry) for name, entry in content.items()}
    place = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.start != place:
            raise ValueError(f"{name} begins at byte {tensor.start:,} of the data and not at {place:,}")
        place = tensor.end
    if place != data_bytes:
        raise ValueError(f"it has {data_bytes:,} bytes of data, and its tensors {place:,}")
    return tensors


def _tensor(name: str, entry: Any) -> Tensor:
    if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"{shorten(name)!r} is not a tensor name")
    values = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), _sizes(values.get("shape")), _sizes(values.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"{name} has no shape or no place")
    if not isinstance(dtype, str) or dtype not in _ITEMSIZES:
        raise ValueError(f"{name} is stored as {shorten(str(dtype))}, which is not supported")
    start, end = offsets
    if math.prod(shape) * _ITEMSIZES[dtype] != end - start:
        raise ValueError(f"{name} is {list(shape)} of {dtype}, which are not {end - start:,} bytes")
    return Tensor(dtype, shape, start, end)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers as a tuple; None for anything else."""
    numbers: list[Any] = value if isinstance(value, list) else [None]
    whole = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**62 for one in numbers)
    return tuple(numbers) if whole else None


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights: one, or those that its index names.

    Raises:
        UserError: there are none, the index is broken, or one is missing.
    """
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    named: dict[str, list[str]] = {}
    for name, file in _index(folder).items():
        named.setdefault(file, []).append(name)
    for file, names in named.items():
        tensors = read_header(folder / file)[0]
        if missing := next((name for name in names if name not in tensors), None):
            raise UserError(
                f"{shorten(missing)} is not in {file}, where the index says it is",
                where=str(folder / INDEX),
                fix="Download the model again.",
            )
    return [folder / file for file in sorted(named)]


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says."""
    path = folder / INDEX
    try:
        places: Any = read_object(path, INDEX_BYTES).get("weight_map")
    except FileNotFoundError:
        raise UserError(
            f"neither {WHOLE} nor {INDEX} is here", where=str(folder), fix="Check that the download is complete."
        ) from None
    if not isinstance(places, dict) or not places:
        raise UserError("it lists no weights (weight_map)", where=str(path), fix="Download it again.")
    for name, file in cast("dict[str, Any]", places).items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{shorten(name)} should be in {shorten(str(file))!r}, which is not a .safetensors file in this folder",
                where=str(path),
            )
    return cast("dict[str, str]", places)


def read_weights_header(folder: Path) -> dict[str, Tensor]:
    """All of a model's tensors by name.

    Raises:
        UserError: a file is missing or broken, or two of them hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found = read_header(path)[0]
        if twice := sorted(tensors.keys() & found):
            raise UserError(f"{twice[0]} is in two files", where=str(path), fix="Download the model again.")
        tensors |= found
    return tensors


def check_floats(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse tensors that hold codes, where numbers are to be computed with.

    Raises:
        UserError: names the first.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not name.endswith(_NO_WEIGHTS):
            raise UserError(
                f"{name} is stored as {tensor.dtype}, but weights must be {', '.join(FLOATS)}", where=str(where)
            )
