"""Writing a model as one GGUF file, a tensor at a time, and reading it back to see that it holds what it should."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderTensor
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, QK_K
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from qingtune.errors import UserError
from qingtune.export.gguf_architectures import Value
from qingtune.export.gguf_layout import GGUFLayout, PlacedTensor, Read

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = {name: Kind[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m")  # which llama.cpp's own quantiser makes
# Steps of the other forms as a share of the largest value of a block, and numbers in a block. Where a block has a
# minimum of its own, its values may lie up to twice the largest one apart. IQ4_NL's steps differ; this is the longest.
_STEPS = {
    Kind.Q4_0: (1 / 8, 32),
    Kind.Q5_0: (1 / 16, 32),
    Kind.Q5_1: (2 / 31, 32),
    Kind.Q8_0: (1 / 127, 32),
    Kind.IQ4_NL: (24 / 127, 32),
    Kind.Q3_K: (1 / 4, 16),
    Kind.Q4_K: (2 / 15, 32),
    Kind.Q5_K: (2 / 31, 32),
    Kind.Q6_K: (1 / 32, 16),
}
# The most that rounding does to a tensor: the root of the summed squared errors over that of the squared weights. A
# step s errs by s/sqrt(12) on average, and the root of a block's squares is at least its largest value m: of a block of
# 32 in 8 bits, with steps of m/127, sqrt(32/12)/127. A twentieth on top, as the steps are kept in 16 bits themselves;
# a quarter where they are kept in 6 or 8 bits.
MOST_ERROR = {
    Kind.F32: 0.0,
    Kind.F16: 2.0**-11,
    Kind.BF16: 2.0**-8,
    **{
        kind: math.sqrt(numbers / 12) * step * (1.25 if kind.name.endswith("_K") else 1.05)
        for kind, (step, numbers) in _STEPS.items()
    },
}
_AT_A_TIME = 1 << 22  # numbers converted together, so that no whole tensor is held in fp32


@dataclass(frozen=True)
class GGUFPlan:
    """What a file is to hold.

    Attributes:
        layout: of the model.
        metadata: settings, tokenizer and description, in order.
        quantize: a key of KINDS, or one of K_QUANTS.
    """

    layout: GGUFLayout
    metadata: Mapping[str, Value]
    quantize: str

    def kind(self, tensor: PlacedTensor) -> Kind | None:
        """In what form a tensor is kept; None where llama.cpp decides.

        Vectors are kept in fp32, and what llama.cpp needs so; in 4-bit files the embedding and the head in 8 bits, as
        they lose most; and in 16 bits whatever does not divide into blocks.
        """
        if _stays(tensor):
            return Kind.F32
        if self.quantize in K_QUANTS:
            return None
        kind = KINDS[self.quantize]
        if kind == Kind.Q4_0 and tensor.name in ("token_embd.weight", "output.weight"):
            kind = Kind.Q8_0
        return kind if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16

    @property
    def undivided(self) -> list[str]:
        """Matrices whose rows do not divide into the blocks of the form asked for."""
        block = QK_K if self.quantize in K_QUANTS else GGML_QUANT_SIZES[KINDS[self.quantize]][0]
        return [tensor.name for tensor in self.layout.tensors if not _stays(tensor) and tensor.shape[-1] % block]


def _stays(tensor: PlacedTensor) -> bool:
    """Whether a tensor is kept in fp32 in every file: vectors, convolutions, and the choice of experts."""
    return len(tensor.shape) == 1 or tensor.name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight"))


@dataclass(frozen=True)
class Kept:
    """The tensors that a file keeps in one form.

    Attributes:
        tensors: how many.
        error: the largest of a tensor, as a share of its size.
        worst: which one that is.
    """

    tensors: int
    error: float
    worst: str


def write_gguf(path: Path, plan: GGUFPlan, read: Read) -> None:
    """Write a file that does not exist, holding one tensor at a time; not for K_QUANTS."""
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
            kind = _chosen(plan, tensor)
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
            _append(file, _encode(tensor.read(read), _chosen(plan, tensor)), writer.data_alignment)


def _chosen(plan: GGUFPlan, tensor: PlacedTensor) -> Kind:
    kind = plan.kind(tensor)
    assert kind is not None, plan.quantize
    return kind


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


def check_gguf(path: Path, plan: GGUFPlan, read: Read) -> dict[str, Kept]:
    """Read a file back and compare everything in it with what it was made of.

    Returns:
        How far the tensors are from the weights, by the form in which they are kept.

    Raises:
        UserError: it is not the same, or a tensor differs by more than rounding can do.
    """
    stored = _check_header(path, plan)
    for name, array in plan.layout.constants.items():
        if not np.array_equal(_rows(path, stored[name]), array.reshape(1, -1).view(np.uint8)):
            raise UserError(f"{name} in the file differs from what was written", where=path.name)
    errors: dict[str, list[tuple[float, str]]] = {}
    for tensor in plan.layout.tensors:
        kind = Kind(stored[tensor.name].tensor_type)
        error = _error(_rows(path, stored[tensor.name]), kind, tensor.read(read))
        if not error <= MOST_ERROR[kind]:  # also where it is no number
            raise UserError(
                f"{tensor.source} stored as {kind.name} differs by {error:.3%}, more than rounding explains "
                f"({MOST_ERROR[kind]:.3%}); nothing was written",
                fix="Try --quantize bf16, which has a larger range." if kind == Kind.F16 else None,
            )
        errors.setdefault(kind.name, []).append((error, tensor.name))
    return {kind: Kept(len(found), *max(found)) for kind, found in errors.items()}


def _check_header(path: Path, plan: GGUFPlan) -> dict[str, ReaderTensor]:
    """Compare a file's metadata, and its tensors' names, forms and shapes; returns where the tensors are.

    The reader, which takes hundreds of megabytes for a large vocabulary, is let go of.
    """
    reader = GGUFReader(path)
    for name, value in plan.metadata.items():
        found = reader.fields[name].contents() if name in reader.fields else None
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            raise UserError(f"{name} in the file differs from what was written", where=path.name)
    wanted = {tensor.name: (plan.kind(tensor), tensor.shape) for tensor in plan.layout.tensors}
    wanted |= {name: (Kind.F32, array.shape) for name, array in plan.layout.constants.items()}
    any_of = {name for name, (kind, _) in wanted.items() if kind is None}
    found = {
        tensor.name: (
            None if tensor.name in any_of and tensor.tensor_type in MOST_ERROR else tensor.tensor_type,
            tuple(reversed(tensor.shape.tolist())),
        )
        for tensor in reader.tensors
    }
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
