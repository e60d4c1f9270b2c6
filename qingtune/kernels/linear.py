"""Frozen linear layers held in 4 or 8 bits, as autograd functions that keep nothing but the packed weight.

4 bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), through the
functional calls of bitsandbytes. Its Linear4bit is not used: on some CPUs the first evaluation repacks its weight in
place, and training after that gets wrong gradients in silence.
8 bits: int8 with one scale a row, the largest value at 127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK_SIZE = 64


class _DequantizedMatmul(torch.autograd.Function):
    """y = x W^T with W made anew in forward and in backward; W gets no gradient."""

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
        weight: [out, in], on the device where the layer will live.
        bias: [out] or None; kept as it is.
    """

    bits: int

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._hold(self.pack(weight.detach()))

    @classmethod
    def restore(cls, shape: tuple[int, int], packed: dict[str, torch.Tensor], bias: torch.Tensor | None) -> Self:
        """The layer whose `packed_tensors` these are.

        Args:
            shape: out and in features.
            packed: on the device where the layer will live.
            bias: [out] or None.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = shape
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer._hold(packed)
        return layer

    @staticmethod
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]."""
        raise NotImplementedError

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """All that stands for the weight, by name, for `restore`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out, in], as the packed form holds it."""
        raise NotImplementedError

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
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]."""
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        return {"packed": packed, **state.as_dict(packed=True)}

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        from bitsandbytes.functional import QuantState

        weight = packed["packed"]
        self.register_buffer("packed", weight, persistent=False)
        self.state = QuantState.from_dict({k: v for k, v in packed.items() if k != "packed"}, weight.device)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """All that stands for the weight."""
        return {"packed": cast("torch.Tensor", self.packed), **self.state.as_dict(packed=True)}

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out, in]."""
        from bitsandbytes import functional

        return functional.dequantize_4bit(cast("torch.Tensor", self.packed), self.state).to(dtype)


class Int8Linear(QuantizedLinear):
    """int8 with an fp32 scale a row."""

    bits = 8

    @staticmethod
    def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a weight, [out, in]."""
        wide = weight.float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return {"packed": (wide / scale).round().to(torch.int8), "scale": scale}

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        for name in ("packed", "scale"):
            self.register_buffer(name, packed[name], persistent=False)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """All that stands for the weight."""
        packed, scale = self.packed_and_scale()
        return {"packed": packed, "scale": scale}

    def packed_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 [out, in] and fp32 [out, 1]."""
        return cast("torch.Tensor", self.packed), cast("torch.Tensor", self.scale)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out, in]."""
        packed, scale = self.packed_and_scale()
        return (packed * scale).to(dtype)


def quantized_class(bits: int) -> type[QuantizedLinear]:
    """The kind of layer that holds its weight in 4 or 8 bits."""
    return NF4Linear if bits == 4 else Int8Linear


def quantize_layer(weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> QuantizedLinear:
    """A frozen layer in 4 or 8 bits from a dense weight, [out, in]."""
    return quantized_class(bits)(weight, bias)
