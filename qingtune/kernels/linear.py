"""Frozen linear layers held in 4 or 8 bits, as autograd functions that keep nothing but the packed weight.

4 bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), through the
functional calls of bitsandbytes. Its Linear4bit is not used: on some CPUs the first evaluation repacks its weight in
place, and training after that gets wrong gradients in silence.
8 bits: int8 with one scale a row, the largest value at 127.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from qingtune.kernels.native import nf4
from qingtune.kernels.native.elementwise import native

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK_SIZE, BLOCK_OF_SCALES = 64, 256
# Quantising takes up to 16 bytes a number meanwhile: 0.8 GB for the gate and up of Phi-3-mini, if done at once.
NUMBERS_PACKED_AT_A_TIME = 2**22
# What bitsandbytes calls below functional.dequantize_4bit on a CPU; its version is pinned, and a test compares the two.
_CPU_KERNELS = {
    torch.float32: "cdequantize_blockwise_cpu_nf4_fp32",
    torch.bfloat16: "cdequantize_blockwise_cpu_nf4_bf16",
    torch.float16: "cdequantize_blockwise_cpu_nf4_fp16",
}


@functools.cache
def import_bitsandbytes() -> ModuleType:
    """The library, imported without PyTorch's compiler: 42 MB and 0.8 s that only its generic kernels would use.

    On import it wraps those in torch.compile, which is disabled meanwhile. To be called before PEFT is imported,
    which imports it as well.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import bitsandbytes
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    return bitsandbytes


class _DequantizedMatmul(torch.autograd.Function):
    """y = x W^T with W dequantised in forward and again in backward; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., out] -> [..., in]."""
        (grad,) = grad_outputs
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer in 4 or 8 bits; subclasses say how the weight is packed.

    Args:
        weight: [out, in], on the device where the layer will live; on meta the layer has buffers of the right sizes.
        bias: [out] or None; kept as it is.
    """

    bits: int
    packed: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        shape = (weight.shape[0], weight.shape[1])
        self._begin(shape, bias)
        if not weight.is_meta:
            self._hold(self.pack(weight.detach()))
            return
        for name, (size, dtype) in self.packed_sizes(*shape).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"), persistent=False)

    def _begin(self, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def restore(cls, shape: tuple[int, int], packed: dict[str, torch.Tensor], bias: torch.Tensor | None) -> Self:
        """The layer whose `packed_tensors` these are, on the device where it will live; shape: out and in features."""
        layer = cls.__new__(cls)
        layer._begin(shape, bias)
        layer._hold(packed)
        return layer

    @staticmethod
    def packed_sizes(out_features: int, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """Count and dtype of the numbers that stand for a weight, by tensor, without the few bytes that describe it."""
        raise NotImplementedError

    @staticmethod
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]."""
        raise NotImplementedError

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The packed weight's tensors by name, for `restore`."""
        return dict(self.named_buffers())

    def dequantize(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, [out, in], as the packed form holds it.

        Args:
            dtype: of the result.
            out: where it may be put, [out, in] of that dtype; not everywhere it can.
        """
        raise NotImplementedError

    def unpacked_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that the weight is best unpacked to for a product in a dtype, in which it is exact."""
        return dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out], in x's dtype."""
        y = cast("torch.Tensor", _DequantizedMatmul.apply(x, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """in and out features and bits, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class NF4Linear(QuantizedLinear):
    """NF4 in blocks of 64, the blocks' scales quantised to 8 bits in turn: about 4.13 bits a weight."""

    bits = 4

    @staticmethod
    def packed_sizes(out_features: int, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """Two codes a byte; a scale in 8 bits a block, one in 32 for each block of these; two tables."""
        numbers = out_features * in_features
        blocks = -(-numbers // BLOCK_SIZE)
        return {
            "packed": (-(-numbers // 2), torch.uint8),
            "absmax": (blocks, torch.uint8),
            "nested_absmax": (-(-blocks // BLOCK_OF_SCALES), torch.float32),
            "quant_map": (2**4, torch.float32),
            "nested_quant_map": (2**8, torch.float32),
        }

    @staticmethod
    def pack(weight: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]; dtype: in which it is unpacked again, None for its own."""
        functional = import_bitsandbytes().functional
        pieces = [
            functional.quantize_4bit(numbers, blocksize=BLOCK_SIZE, compress_statistics=False, quant_type="nf4")
            for numbers in weight.contiguous().view(-1).split(NUMBERS_PACKED_AT_A_TIME)
        ]
        scales = torch.cat([state.absmax for _, state in pieces])
        offset = scales.mean()
        codes, nested = functional.quantize_blockwise(scales - offset, blocksize=BLOCK_OF_SCALES)
        state = functional.QuantState(
            codes, weight.shape, pieces[0][1].code, BLOCK_SIZE, "nf4", dtype or weight.dtype, offset, nested
        )
        return {"packed": torch.cat([packed for packed, _ in pieces]), **state.as_dict(packed=True)}

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        scales = {name: tensor for name, tensor in packed.items() if name != "packed"}
        super()._hold({"packed": packed["packed"]})
        self.state = import_bitsandbytes().functional.QuantState.from_dict(scales, self.packed.device)
        self._in_blocks = self._state_in_blocks()
        self._offset = float(self.state.offset) if self.state.nested else 0.0

    def _state_in_blocks(self) -> Any:
        """The state with a shape whose rows divide into blocks.

        Blocks go on over the ends of rows, but the library's CPU kernel begins a new one with each row: where rows do
        not divide into blocks it takes wrong scales, and reads beyond the last one.
        """
        state, numbers = copy.copy(self.state), self.out_features * self.in_features
        if self.in_features % state.blocksize:
            columns = state.blocksize if numbers % state.blocksize == 0 else numbers
            state.shape = torch.Size((numbers // columns, columns))
        return state

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The packed weight's tensors."""
        return {"packed": self.packed, **self.state.as_dict(packed=True)}

    def unpacked_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The state's if it is narrower, as in a model stored in 4 bits with 16-bit values that trains in fp32."""
        return self.state.dtype if self.state.dtype.itemsize < dtype.itemsize else dtype

    def dequantize(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, [out, in]."""
        if out is not None and out.dtype == self.state.dtype:
            if nf4.fits(self.state, out):
                nf4.unpack(self.packed, self.state, self._offset, out)
                return out
            if self._dequantize_on_cpu(out):
                return out
        weight = import_bitsandbytes().functional.dequantize_4bit(self.packed, self._in_blocks).to(dtype)
        return weight.reshape(self.out_features, self.in_features)  # two numbers would come back transposed

    def _dequantize_on_cpu(self, out: torch.Tensor) -> bool:
        """Have the library's CPU kernel write to a place of ours, in the state's dtype; False where that cannot be.

        Its Python side takes fresh memory for each weight, which leaves holes of 0.2 GB in the heap or, if it is given
        back each time, costs a tenth of the speed.
        """
        functional = import_bitsandbytes().functional
        kernel = getattr(import_bitsandbytes().cextension.lib, _CPU_KERNELS.get(out.dtype, ""), None)
        if kernel is None or out.device.type != "cpu" or self._in_blocks.shape[1] % 2:
            return False
        scales = self.state.absmax
        if self.state.nested:
            scales = functional.dequantize_blockwise(scales, self.state.state2).add_(self.state.offset)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (self.packed, scales, out))
        kernel(*pointers, *(ctypes.c_longlong(number) for number in (self.state.blocksize, *self._in_blocks.shape)))
        return True


class Int8Linear(QuantizedLinear):
    """int8 [out, in] with an fp32 scale a row, [out, 1]."""

    bits = 8
    scale: torch.Tensor

    @staticmethod
    def packed_sizes(out_features: int, in_features: int) -> dict[str, tuple[int, torch.dtype]]:
        """A byte a weight, and a scale a row."""
        return {"packed": (out_features * in_features, torch.int8), "scale": (out_features, torch.float32)}

    @staticmethod
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]."""
        packed = weight.new_empty(weight.shape, dtype=torch.int8)
        scale = weight.new_empty((len(weight), 1), dtype=torch.float32)
        rows = max(1, NUMBERS_PACKED_AT_A_TIME // max(1, weight.shape[1]))
        for some, codes, scales in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
            wide = some.float()
            scales.copy_(wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127)
            codes.copy_((wide / scales).round())
        return {"packed": packed, "scale": scale}

    def dequantize(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, [out, in]."""
        if out is not None and (c := native(out)):
            c.widen(self.packed, self.scale, out)
            return out
        if out is not None and out.dtype == torch.float32:  # torch.mul would first convert the packed numbers elsewhere
            return out.copy_(self.packed).mul_(self.scale)
        return (self.packed * self.scale).to(dtype) if out is None else torch.mul(self.packed, self.scale, out=out)


def quantized_class(bits: int) -> type[QuantizedLinear]:
    """The kind of layer that holds its weight in 4 or 8 bits."""
    return NF4Linear if bits == 4 else Int8Linear
