"""Matrices as the kernels in C read them: dense ones row by row, 4 and 8 bits in blocks of 16 rows by 32 columns.

Rows of activations in fp32 are multiplied in C; in bf16 only a few, and many, as of a prompt, by PyTorch.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from qingtune.answering.decoder.packed import round_to_int8
from qingtune.kernels.workspace import Workspace

GROUP_SIZE = 32  # weights of a row in 4 bits, and activations, that share a scale
BLOCK_ROWS = 16
BF16, INT8, INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS = range(6)


class MatrixStruct(ctypes.Structure):
    """`Matrix` of answer_step.c."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


FEW_ROWS = 16  # up to which C is faster than PyTorch in bf16, whose products of few rows read weights at half the rate


def fits_native(rows: int, columns: int) -> bool:
    """Whether a weight has a shape that the kernels multiply."""
    return rows % BLOCK_ROWS == 0 and columns % GROUP_SIZE == 0


class NativeMatrix(ABC):
    """What all kinds share."""

    def __init__(self, library: ctypes.CDLL, kind: int, shape: torch.Size, bias: torch.Tensor | None) -> None:
        self._library, self.kind, self.shape = library, kind, shape
        self.bias = None if bias is None else bias.float().contiguous()

    @property
    @abstractmethod
    def held(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight as it is kept, and its scales."""

    @property
    def held_bytes(self) -> int:
        """Bytes that a product reads of it."""
        return sum(part.numel() * part.element_size() for part in self.held if part is not None)

    def struct(self) -> MatrixStruct:
        """Where its parts lie; to be used only as long as the matrix lives."""
        parts = (*self.held, self.bias)
        assert all(part is None or part.is_contiguous() for part in parts)
        return MatrixStruct(*(None if part is None else part.data_ptr() for part in parts), self.kind, *self.shape)

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N], in x's dtype; what is added is [T, N] too."""
        many = x.dtype == torch.bfloat16 and len(x) > FEW_ROWS
        y = self.multiply_many(x) if many else self._multiply_in_c(x.float().contiguous()).to(x.dtype)
        return y if added is None else y.add_(added)

    @abstractmethod
    def multiply_many(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 [T, K] -> [T, N], with the bias."""

    def _multiply_in_c(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, K] -> [T, N], with the bias; for 4 and 8 bits x is rounded as the kernels do."""
        matrix, count, threads = ctypes.byref(self.struct()), ctypes.c_int64(len(x)), _threads()
        scratch = torch.empty(self._library.product_scratch_bytes(matrix, count, threads), dtype=torch.uint8)
        y = torch.empty(len(x), self.shape[0])
        places = [ctypes.c_void_p(part.data_ptr()) for part in (x, scratch, y)]
        self._library.multiply_rows(matrix, places[0], count, threads, *places[1:])
        return y


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


class Bf16Rows(NativeMatrix):
    """A weight [N, K] as it is; one that is mapped from a file will do."""

    def __init__(self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(library, BF16, weight.shape, bias)
        self.weight = weight.to(torch.bfloat16).contiguous()

    @property
    def held(self) -> tuple[torch.Tensor, None]:
        """The weight."""
        return self.weight, None

    def multiply_many(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class ExactRows(NativeMatrix):
    """A weight [N, K] that fp32 is multiplied by as it is stored, in bf16 or fp16; one mapped from a file will do.

    Of fp32 the upper 24 bits are kept: 2^-16 at most of a weight is lost, of a product 6e-6. In bf16 it would be 256
    times as much, and what a short training has added to a weight could vanish.
    """

    def __init__(self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        kind = {torch.bfloat16: EXACT_BF16, torch.float16: EXACT_FP16}.get(weight.dtype, EXACT_24_BITS)
        super().__init__(library, kind, weight.shape, bias)
        self.weight = weight.contiguous() if kind != EXACT_24_BITS else _to_24_bits(library, weight)

    @property
    def held(self) -> tuple[torch.Tensor, None]:
        """The weight as it is stored, or uint8 [N, K / 32, 96]."""
        return self.weight, None

    def multiply_many(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 [T, K] -> [T, N]: through fp32, as few rows are."""
        return self._multiply_in_c(x.float().contiguous()).to(x.dtype)


def _to_24_bits(library: ctypes.CDLL, weight: torch.Tensor) -> torch.Tensor:
    """fp32 [N, K] as uint8 [N, K / 32, 96]: of 32 columns the upper 16 bits, then the next 8 of each."""
    weight = weight.float().contiguous()
    out = torch.empty(len(weight), weight.shape[1] // GROUP_SIZE, 3 * GROUP_SIZE, dtype=torch.uint8)
    places = [ctypes.c_void_p(part.data_ptr()) for part in (weight, out)]
    library.to_24_bits(*places, ctypes.c_int64(weight.numel()), _threads())
    return out


class PackedBlocks(NativeMatrix):
    """A weight [N, K] in 8 bits, the largest value of a row at 127; or in 4, 16 steps between the least and the
    largest of each 32 numbers of a row.

    Args:
        bits: 4 or 8.
        workspace: holds it unpacked for as long as a product of many rows takes.
    """

    def __init__(
        self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None, bits: int, workspace: Workspace
    ) -> None:
        super().__init__(library, INT8 if bits == 8 else INT4, weight.shape, bias)
        parts = weight.split(ROWS_AT_A_TIME)
        if bits == 8:
            packed, scales = zip(*(int8_blocks(rows) for rows in parts), strict=True)
            self.blocks, self.scale = torch.cat(packed), torch.cat(scales)
        else:
            self.blocks, self.scale = torch.cat([int4_blocks(rows) for rows in parts]), None
        self.workspace = workspace

    @property
    def held(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The blocks, and in 8 bits the rows' scales, fp32."""
        return self.blocks, self.scale

    def dense(self) -> torch.Tensor:
        """The unpacked weight, transposed: bf16 [K, N], until the next matrix is unpacked."""
        out = self.workspace.take("unpacked", (self.shape[1], self.shape[0]), torch.bfloat16)
        self._library.unpack(ctypes.byref(self.struct()), ctypes.c_void_p(out.data_ptr()), _threads())
        return out

    def multiply_many(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        y = x @ self.dense()
        return y if self.bias is None else y.add_(self.bias)


ROWS_AT_A_TIME = 8192  # rounded at once: what that takes for a moment is several times the weight


def int8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] as uint8 [N / 16, K / 32, 512], and its rows' scales, fp32 [N].

    Byte [i, row, j] of a block holds 128 more than column 4 i + j, i in 0..7, j in 0..3.
    """
    numbers, scale = round_to_int8(weight)
    places = numbers.view(len(weight) // BLOCK_ROWS, BLOCK_ROWS, -1, 8, 4).permute(0, 2, 3, 1, 4)
    return (places.contiguous().view(torch.uint8) ^ 128).flatten(2), scale


def int4_blocks(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] in 4 bits: uint8 [N / 16, K / 32, 320].

    A block holds 16 scales and 16 offsets (bf16), one a row, then numbers: byte [i, row, j] holds columns 4 i + j in
    its lower half and 16 + 4 i + j in its upper one, i and j in 0..3.
    """
    groups = weight.float().view(len(weight) // BLOCK_ROWS, BLOCK_ROWS, -1, GROUP_SIZE)
    least, largest = groups.aminmax(dim=3)
    offset = least.bfloat16()  # rounded first, to find the best numbers for it; likewise the scale
    scale = ((largest - least) / 15).clamp_min_(1e-6).bfloat16()
    numbers = (groups - offset.float()[..., None]).div_(scale.float()[..., None]).round_().clamp_(0, 15)
    places = numbers.to(torch.uint8).view(*scale.shape, 2, 4, 4).permute(0, 2, 3, 4, 1, 5)  # [.., half, i, row, j]
    pairs = (places[:, :, 0] | places[:, :, 1] << 4).flatten(2)
    scales = torch.stack([scale, offset], 1).permute(0, 3, 1, 2).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([scales, pairs], 2)


def native_matrix(
    library: ctypes.CDLL,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int | None,
    dtype: torch.dtype,
    workspace: Workspace,
) -> NativeMatrix:
    """A matrix that holds a weight [N, K]; `fits_native` says of which shapes.

    Args:
        library: the compiled kernels.
        weight: as it is stored, or in fp32.
        bias: [N] or None.
        bits: 4 or 8 to hold it in; None for bf16 where that is what it is multiplied with, else for its own dtype.
        dtype: of what it is multiplied with, bf16 or fp32.
        workspace: holds 4 and 8 bits unpacked for as long as a product of many rows in bf16 takes.
    """
    if bits is not None:
        return PackedBlocks(library, weight, bias, bits, workspace)
    return Bf16Rows(library, weight, bias) if dtype == torch.bfloat16 else ExactRows(library, weight, bias)
