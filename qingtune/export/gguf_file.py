"""Writing a model as one GGUF file, a tensor at a time, and reading it back to see that it holds what it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from qingtune.errors import UserError
from qingtune.export.gguf_layout import GGUFLayout, PlacedTensor, Value

if TYPE_CHECKING:
    from numpy.typing import NDArray

Read = Callable[[str], torch.Tensor]  # gives a tensor of the model by its name in the folder, in any float dtype

KINDS = {name: Kind[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
# The most that rounding does to a tensor: the root of the summed squared errors over that of the squared weights. Of a
# block of 32 with m its largest value, 8 bits round to steps of m/127 and 4 bits to steps of m/8. A step s errs by
# s/sqrt(12) on average, and the root of the block's squares is at least m, hence sqrt(32/12)/127. A twentieth on top,
# as the steps are kept in 16 bits themselves.
MOST_ERROR = {
    Kind.F32: 0.0,
    Kind.F16: 2.0**-11,
    Kind.BF16: 2.0**-8,
    Kind.Q8_0: math.sqrt(32 / 12) / 127 * 1.05,
    Kind.Q4_0: math.sqrt(32 / 12) / 8 * 1.05,
}
_AT_A_TIME = 1 << 22  # numbers converted together, so that no whole tensor is held in fp32


@dataclass(frozen=True)
class GGUFPlan:
    """What a file is to hold.

    Attributes:
        layout: of the model.
        metadata: settings, tokenizer and description, in order.
        quantize: a key of KINDS.
    """

    layout: GGUFLayout
    metadata: Mapping[str, Value]
    quantize: str

    def kind(self, tensor: PlacedTensor) -> Kind:
        """In what form a tensor is kept.

        Vectors are kept in fp32; in 4-bit files the embedding and the head in 8 bits, as they lose most; and in 16 bits
        whatever does not divide into blocks.
        """
        if len(tensor.shape) == 1:
            return Kind.F32
        kind = KINDS[self.quantize]
        if kind == Kind.Q4_0 and tensor.name in ("token_embd.weight", "output.weight"):
            kind = Kind.Q8_0
        return kind if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16

    @property
    def undivided(self) -> list[str]:
        """Tensors that stay in 16 bits as their rows do not divide into blocks."""
        wanted = {KINDS[self.quantize], Kind.F32, Kind.Q8_0}
        return [tensor.name for tensor in self.layout.tensors if self.kind(tensor) not in wanted]


def write_gguf(path: Path, plan: GGUFPlan, read: Read) -> None:
    """Write a file that does not exist, holding one tensor at a time."""
    writer = GGUFWriter(path, plan.layout.architecture)
    try:
        for name, value in plan.metadata.items():
            kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
            writer.add_key_value(name, value, kind)
        writer.add_file_type(LlamaFileType["ALL_F32" if plan.quantize == "f32" else f"MOSTLY_{plan.quantize.upper()}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for name, array in plan.layout.constants.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        for tensor in plan.layout.tensors:
            kind = plan.kind(tensor)
            size = math.prod(quant_shape_to_byte_shape(tensor.shape, kind))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        for array in plan.layout.constants.values():
            _append(file, array, writer.data_alignment)
        for tensor in plan.layout.tensors:
            _append(file, _encode(tensor.arrange(read(tensor.source)), plan.kind(tensor)), writer.data_alignment)


def _append(file: BufferedWriter, array: NDArray[Any], alignment: int) -> None:
    """Write a tensor's data, filled up on both sides to a multiple of the alignment.

    As GGUFWriter.write_tensor_data, which hides behind numpy's own message why a disk takes no more.
    """
    file.write(bytes(-file.tell() % alignment))
    file.write(np.ascontiguousarray(array).data)
    file.write(bytes(-file.tell() % alignment))


def _blocks(tensor: torch.Tensor) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """A tensor's rows in pieces, fp32; a vector is one row."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _AT_A_TIME // rows.shape[1])
    for start in range(0, len(rows), step):
        yield slice(start, start + step), rows[start : start + step].float().numpy()


def _encode(tensor: torch.Tensor, kind: Kind) -> NDArray[np.uint8]:
    """A tensor as bytes, uint8 [rows, bytes a row]."""
    rows = math.prod(tensor.shape[:-1])
    out = np.empty(quant_shape_to_byte_shape((rows, tensor.shape[-1]), kind), np.uint8)
    for place, block in _blocks(tensor):
        with np.errstate(over="ignore", invalid="ignore"):  # what is lost is found when the file is read back
            out[place] = np.ascontiguousarray(quantize(block, kind)).view(np.uint8)
    return out


# --- Reading back ----------------------------------------------------------------------------------------------------


def _rows(path: Path, tensor: ReaderTensor) -> NDArray[np.uint8]:
    """A stored tensor's bytes, uint8 [rows, bytes a row], in memory of their own; a vector is one row."""
    stored = np.fromfile(path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
    return stored.reshape(math.prod(tensor.shape[1:].tolist()), -1)


def check_gguf(path: Path, plan: GGUFPlan, read: Read) -> dict[str, tuple[float, str]]:
    """Read a file back and compare everything in it with what it was made of.

    Returns:
        The largest error of a tensor, and which one it is, by the form in which tensors are kept.

    Raises:
        UserError: it is not the same, or a tensor differs by more than rounding can do.
    """
    stored = _check_header(path, plan)
    for name, array in plan.layout.constants.items():
        if not np.array_equal(_rows(path, stored[name]), array.reshape(1, -1).view(np.uint8)):
            raise UserError(f"{name} in the file differs from what was written", where=path.name)
    worst: dict[str, tuple[float, str]] = {}
    for tensor in plan.layout.tensors:
        kind = plan.kind(tensor)
        error = _error(_rows(path, stored[tensor.name]), kind, tensor.arrange(read(tensor.source)))
        if not error <= MOST_ERROR[kind]:  # also where it is no number
            raise UserError(
                f"{tensor.source} stored as {kind.name} differs by {error:.3%}, more than rounding explains "
                f"({MOST_ERROR[kind]:.3%}); nothing was written",
                fix="Try --quantize bf16, which has a larger range." if kind == Kind.F16 else None,
            )
        worst[kind.name] = max(worst.get(kind.name, (0.0, "")), (error, tensor.name))
    return worst


def _check_header(path: Path, plan: GGUFPlan) -> dict[str, ReaderTensor]:
    """Compare a file's metadata, and its tensors' names, forms and shapes; returns where the tensors are.

    The reader, which takes hundreds of megabytes for a large vocabulary, is let go of.
    """
    reader = GGUFReader(path)
    for name, value in plan.metadata.items():
        found = reader.fields[name].contents() if name in reader.fields else None
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            raise UserError(f"{name} in the file differs from what was written", where=path.name)
    found = {tensor.name: (tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))) for tensor in reader.tensors}
    wanted = {tensor.name: (plan.kind(tensor), tensor.shape) for tensor in plan.layout.tensors}
    wanted |= {name: (Kind.F32, array.shape) for name, array in plan.layout.constants.items()}
    if found != wanted:
        raise UserError("the tensors in the file differ from those that were written", where=path.name)
    return {tensor.name: tensor for tensor in reader.tensors}


def _error(stored: NDArray[np.uint8], kind: Kind, wanted: torch.Tensor) -> float:
    """How far a stored tensor is from the one wanted, as a share of its size (Frobenius norms)."""
    apart = size = 0.0
    for place, block in _blocks(wanted):
        with np.errstate(invalid="ignore"):
            apart += float(np.sum((dequantize(stored[place], kind) - block).astype(np.float64) ** 2))
        size += float(np.sum(block.astype(np.float64) ** 2))
    return math.sqrt(apart / size) if size else math.sqrt(apart)
