"""Matrices as the kernels in C read them: dense ones row by row, 4 and 8 bits in blocks of 16 rows by 32 columns. Rows
are filled up with zeros to a multiple of 16.

Rows of activations in fp32 are multiplied in C. So are those in bf16 by weights in 8 and 4 bits, where the CPU's units
for bytes are its fastest ones; by dense weights only a few are, and many, as of a prompt, by PyTorch.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from qingtune.answering.decoder.packed import ROWS_AT_A_TIME, plus, round_to_int8
from qingtune.kernels.workspace import Workspace
from qingtune.machine.resources import cpu_flags

GROUP_SIZE = 32  # weights of a row in 4 bits, and activations, that share a scale
BLOCK_ROWS = 16
BF16, INT8, INT4, EXACT_BF16, EXACT_FP16, EXACT_24_BITS = range(6)
FEW_ROWS = 16  # up to which C is faster than PyTorch in bf16, whose products of few rows read weights at half the rate


class MatrixStruct(ctypes.Structure):
    """`Matrix` of matrices.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns")),
    ]


def fits_native(columns: int) -> bool:
    """Whether a weight has so many columns that the kernels multiply it."""
    return columns % GROUP_SIZE == 0


class NativeMatrix:
    """A weight [N, K] as the kernels multiply it, for K that `fits_native`; F: N filled up.

    Args:
        library: the compiled kernels.
        weight: as it is stored, or in fp32; one that is mapped from a file will do.
        bias: [N] or None.
        bits: 4 or 8 to hold it in; None for bf16 where that is what it is multiplied with, else for its own dtype.
        dtype: of what it is multiplied with, bf16 or fp32.
        workspace: holds 4 and 8 bits unpacked for as long as a product of many rows in bf16 by PyTorch takes.

    Attributes:
        rows: N.
        shape: [F, K].
        kind: how the weight is kept. EXACT: fp32 is multiplied by it as it is stored, in bf16 or fp16; of fp32 the
            upper 24 bits are kept: 2^-16 at most of a weight is lost, of a product 6e-6. In bf16 it would be 256 times
            as much, and what a short training has added to a weight could vanish.
        weight: [F, K], or as `_to_24_bits`, `_int8_blocks` and `_int4_blocks` give it.
        scale: in 8 bits of each row, fp32 [F].
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bits: int | None,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        self._library, self.workspace, self.rows = library, workspace, len(weight)
        if missing := -len(weight) % BLOCK_ROWS:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        self.shape, self.bias = weight.shape, None if bias is None else bias.float().contiguous()
        self.scale: torch.Tensor | None = None
        self._of_bytes = bits is not None and _bytes_are_fastest()
        parts = weight.split(ROWS_AT_A_TIME)
        if bits == 8:
            packed, scales = zip(*(_int8_blocks(rows) for rows in parts), strict=True)
            self.kind, self.weight, self.scale = INT8, torch.cat(packed), torch.cat(scales)
        elif bits == 4:
            self.kind, self.weight = INT4, torch.cat([_int4_blocks(rows) for rows in parts])
        elif dtype == torch.bfloat16:
            self.kind, self.weight = BF16, weight.to(torch.bfloat16).contiguous()
        elif weight.dtype in (torch.bfloat16, torch.float16):
            self.kind = EXACT_BF16 if weight.dtype == torch.bfloat16 else EXACT_FP16
            self.weight = weight.contiguous()
        else:
            self.kind, self.weight = EXACT_24_BITS, _to_24_bits(library, weight)

    def struct(self) -> MatrixStruct:
        """Where its parts lie; to be used only as long as the matrix lives."""
        parts = (self.weight, self.scale, self.bias)
        assert all(part is None or part.is_contiguous() for part in parts)
        return MatrixStruct(*(None if part is None else part.data_ptr() for part in parts), self.kind, *self.shape)

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N], in x's dtype; what is added is [T, N] too."""
        if x.dtype == torch.float32 or self._of_bytes or len(x) <= FEW_ROWS:
            y = self._multiply_in_c(x.float().contiguous()).to(x.dtype)
        elif self.kind == BF16:
            y = F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        else:
            y = plus(x @ self.dense(), self.bias)
        return plus(y[:, : self.rows], added)

    def dense(self) -> torch.Tensor:
        """A weight in 4 or 8 bits, unpacked and transposed: bf16 [K, F], until the next matrix is unpacked."""
        assert self.kind in (INT4, INT8)
        out = self.workspace.take("unpacked", (self.shape[1], self.shape[0]), torch.bfloat16)
        self._library.unpack(ctypes.byref(self.struct()), ctypes.c_void_p(out.data_ptr()), _threads())
        return out

    def _multiply_in_c(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, K] -> [T, F], with the bias; for 4 and 8 bits x is rounded as the kernels do."""
        matrix, count, threads = ctypes.byref(self.struct()), ctypes.c_int64(len(x)), _threads()
        scratch = torch.empty(self._library.product_scratch_bytes(matrix, count, threads), dtype=torch.uint8)
        y = torch.empty(len(x), self.shape[0])
        places = [ctypes.c_void_p(part.data_ptr()) for part in (x, scratch, y)]
        self._library.multiply_rows(matrix, places[0], count, threads, *places[1:])
        return y


def _bytes_are_fastest() -> bool:
    """Whether C multiplies rounded rows by bytes faster than PyTorch multiplies rows in bf16 by unpacked weights."""
    flags = cpu_flags()
    return bool(flags & {"avx512_vnni", "avx_vnni"}) and "amx_bf16" not in flags


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


def _to_24_bits(library: ctypes.CDLL, weight: torch.Tensor) -> torch.Tensor:
    """fp32 [N, K] as uint8 [N, K / 32, 96]: of 32 columns the upper 16 bits, then the next 8 of each."""
    weight = weight.float().contiguous()
    out = torch.empty(len(weight), weight.shape[1] // GROUP_SIZE, 3 * GROUP_SIZE, dtype=torch.uint8)
    places = [ctypes.c_void_p(part.data_ptr()) for part in (weight, out)]
    library.to_24_bits(*places, ctypes.c_int64(weight.numel()), _threads())
    return out


def _int8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] as uint8 [N / 16, K / 32, 512], and its rows' scales, fp32 [N].

    Byte [i, row, j] of a block holds 128 more than column 4 i + j, i in 0..7, j in 0..3.
    """
    numbers, scale = round_to_int8(weight)
    places = numbers.view(len(weight) // BLOCK_ROWS, BLOCK_ROWS, -1, 8, 4).permute(0, 2, 3, 1, 4)
    return (places.contiguous().view(torch.uint8) ^ 128).flatten(2), scale


def _int4_blocks(weight: torch.Tensor) -> torch.Tensor:
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
