"""A model folder's tensors, read one at a time; those in 4 bits (NF4) as bitsandbytes and Transformers lay them out:
the packed weight under its own name, its scales, tables and description under names that start with that name.

Files of a multimodal model name the tensors of its language model otherwise than a model of text alone does: here all
go by the names in the latter (`text_name`), and what else there is, as of the vision tower, by its own.

NF4: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import safe_open

from qingtune.errors import UserError
from qingtune.files.json_files import parse_object
from qingtune.files.weights_file import Tensor, read_header, weight_files
from qingtune.kernels.linear import NF4Linear
from qingtune.models.find import NF4_MARK
from qingtune.models.layers import stored_tensors
from qingtune.models.multimodal import text_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parts = dict[str, torch.Tensor]
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# What files hold for each expert, by the parameter that Transformers joins it to.
PARTS_OF_EXPERTS = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}


class _Described(NamedTuple):
    """The shape [out, in] of a packed weight and the dtype in which it is unpacked."""

    shape: tuple[int, int]
    dtype: torch.dtype


class StoredWeights:
    """The tensors of a model folder, read one at a time, so that a process never holds the files' pages all at once.

    Weights that are stored in 4 bits (NF4) are unpacked.

    Attributes:
        shapes: of the tensors, by text name.
        own_names: those in the files, by text name.
        packed: the weights stored in 4 bits, by text name, each with its tensors' own names by part name.

    Raises:
        UserError: a weight in 4 bits is stored in a way not known here.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._described: dict[str, _Described] = {}
        self._joined: dict[str, list[list[str]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Tensor, int]] = {}
        for path in weight_files(folder):
            tensors, start_of_data = read_header(path)
            for name, tensor in tensors.items():
                self._files[name], self._places[name], shapes[name] = path, (tensor, start_of_data), tensor.shape
        packed = _parts_of(shapes)
        for weight, parts in packed.items():
            with self._faults(weight):
                self._described[weight] = _describe(self._read(weight + NF4_MARK))
            for part in parts.values():
                del shapes[part]
            shapes[weight] = self._described[weight].shape
        self.own_names = {text_name(name): name for name in shapes}
        self.shapes = {text_name(name): shape for name, shape in shapes.items()}
        self.packed = {text_name(weight): parts for weight, parts in packed.items()}

    def join_experts(self, model: PreTrainedModel) -> None:
        """Let experts that are stored one by one be read as the parameters [E, out, in] that a model has for them."""
        for own, tensor in stored_tensors(model).items():
            name = text_name(own)
            module, _, matrix = name.rpartition(".")
            if name in self.shapes or matrix not in PARTS_OF_EXPERTS or tensor.ndim != 3:
                continue
            count, rows, columns = tensor.shape
            names = PARTS_OF_EXPERTS[matrix]
            parts = [[f"{module}.{number}.{part}.weight" for part in names] for number in range(count)]
            shape = (rows // len(names), columns)
            if all(self.shapes.get(part) == shape for one in parts for part in one):
                self._joined[name], self.shapes[name] = parts, tuple(tensor.shape)

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether all that a model without quantised layers is made of is there, in its shapes."""
        wanted = stored_tensors(model).items()
        return all(self.shapes.get(text_name(name)) == tuple(tensor.shape) for name, tensor in wanted)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own memory, by its text name or one of which that is made."""
        own = self._own(name)
        if parts := self._joined.get(text_name(name)):
            return self._read_joined(parts, self.shapes[text_name(name)])
        if own not in self._described:
            return self._read(own)
        with self._faults(own):
            described = self._described[own]
            return _layer_of(described, self._parts(own), None).dequantize(described.dtype)

    def split(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the files hold of a parameter, by own names: itself, or of experts stored one by one each one's part."""
        if (parts := self._joined.get(text_name(name))) is None:
            return {self._own(name): tensor}
        return {
            self._own(part): rows
            for expert, names in zip(tensor, parts, strict=True)
            for rows, part in zip(expert.chunk(len(names)), names, strict=True)
        }

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor that stays in its file, of which only what is looked at takes memory; not to be written to."""
        own = self._own(name)
        if own in self._described or text_name(name) in self._joined:
            return self.read(name)
        with safe_open(self._files[own], "pt") as file:
            return file.get_tensor(own)

    def layer(self, name: str, bias: torch.Tensor | None, device: torch.device) -> NF4Linear:
        """The frozen layer of a weight stored in 4 bits, its codes as they are; bias: [out] on the device, or None."""
        own = self._own(name)
        with self._faults(own):
            parts = {part: tensor.to(device) for part, tensor in self._parts(own).items()}
            return _layer_of(self._described[own], parts, bias)

    def _read_joined(self, parts: list[list[str]], shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of all experts, filled with the matrices of each, so that memory is taken for it alone."""
        joined = torch.empty(shape, dtype=self.read(parts[0][0]).dtype)
        for expert, names in zip(joined, parts, strict=True):
            for rows, part in zip(expert.chunk(len(names)), names, strict=True):
                rows.copy_(self.read(part))
        return joined

    def _own(self, name: str) -> str:
        return self.own_names.get(text_name(name), name)

    def _read(self, name: str) -> torch.Tensor:
        return read_whole(self._files[name], *self._places[name])

    def _parts(self, weight: str) -> Parts:
        return {part: self._read(name) for part, name in self.packed[text_name(weight)].items()}

    @contextlib.contextmanager
    def _faults(self, weight: str) -> Generator[None]:
        """Report as a UserError what is wrong with a weight stored in 4 bits."""
        try:
            yield
        except ValueError as error:
            where = str(self._files.get(weight, weight))
            raise UserError(f"{weight} is in 4 bits: {error}", where=where, fix="Download it again.") from None


def read_whole(path: Path, place: Tensor, start_of_data: int) -> torch.Tensor:
    """A tensor of a safetensors file in memory of its own: mapped pages would count as the process's until they are
    given back.

    Args:
        place: as the file's header has it; likewise start_of_data.

    Raises:
        UserError: the file has become shorter since.
    """
    tensor = torch.empty(place.shape, dtype=_DTYPES[place.dtype])
    with path.open("rb") as file:
        file.seek(start_of_data + place.start)
        size, into = place.end - place.start, cast("Any", tensor.view(-1).view(torch.uint8).numpy())
        if size and file.readinto(into) != size:
            raise UserError("it has become shorter while it was read", where=str(path), fix="Download it again.")
    return tensor


def stored_names(weight: str, parts: Parts) -> Parts:
    """The tensors of a packed weight, by `NF4Linear.packed_tensors`, under the names they are stored by."""
    return {weight if part == "packed" else f"{weight}.{part}": tensor for part, tensor in parts.items()}


def _parts_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The packed weights among a model's tensors, with their parts as `stored_names` takes them -> tensors' names."""
    names = list(names)
    packed = {name.removesuffix(NF4_MARK): dict[str, str]() for name in names if name.endswith(NF4_MARK)}
    for name in names:
        weight = name.partition(".weight.")[0].removesuffix(".weight") + ".weight"
        if weight in packed:
            packed[weight][name.removeprefix(weight).removeprefix(".") or "packed"] = name
    return packed


def _describe(description: torch.Tensor) -> _Described:
    """Read what a packed weight says of itself: uint8, JSON in UTF-8. ValueError: it is not that."""
    try:
        state = parse_object(bytes(description.tolist()), "its description")
        out_features, in_features = (int(size) for size in state["shape"])
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[state["dtype"]]
    except (UserError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its description cannot be read ({error})") from None
    return _Described((out_features, in_features), dtype)


def _layer_of(described: _Described, parts: Parts, bias: torch.Tensor | None) -> NF4Linear:
    """The frozen layer whose packed weight this is. ValueError: parts are missing or do not belong together."""
    numbers = math.prod(described.shape)
    try:
        layer = NF4Linear.restore(described.shape, parts, bias)
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its parts cannot be used ({error})") from None
    state: Any = layer.state
    blocks = -(-numbers // state.blocksize)
    nested = state.state2.absmax.numel() * state.state2.blocksize if state.nested else blocks
    if parts["packed"].numel() != -(-numbers // 2) or state.absmax.numel() != blocks or nested < blocks:
        raise ValueError("its parts do not belong together")
    return layer
