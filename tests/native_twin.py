"""The products of answer_step.c in plain PyTorch, and the variants of it that this machine can run."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest
import torch

from qingtune.answering.decoder.native.matrices import GROUP_SIZE
from qingtune.answering.decoder.packed import round_to_int8
from qingtune.machine.resources import cpu_flags

WIDE = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}


@dataclass(frozen=True)
class Variant:
    """One that the source is compiled to: which of the CPU's units are hidden, what the compiler is passed for it."""

    name: str
    runs: bool  # on this machine
    hidden: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """What hides the units."""
        return {"QINGTUNE_CPU_WITHOUT": ",".join((os.environ.get("QINGTUNE_CPU_WITHOUT", ""), *self.hidden))}


def _variants() -> list[Variant]:
    flags = cpu_flags() if sys.platform == "linux" else set[str]()
    small = {"avx2", "fma", "f16c"} <= flags
    return [
        Variant("AVX-512", flags >= WIDE),
        Variant("AVX-512 without VNNI", flags >= WIDE, ("avx512_vnni", "avx512_bf16")),
        Variant("AVX2", small, ("avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni")),
        # The same instructions as AVX-VNNI's, on a CPU that has them as a part of AVX-512.
        Variant("AVX2 with VNNI", small and ("avx_vnni" in flags or flags >= WIDE), ("avx512_bf16",), ("-DLANES=8",)),
    ]


VARIANTS = [
    pytest.param(variant, id=variant.name, marks=pytest.mark.skipif(not variant.runs, reason=f"needs {variant.name}"))
    for variant in _variants()
]


def upper_24_bits(weight: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to a mantissa of 16 bits, the leading one included: each number by itself, in fp64."""
    mantissa, exponent = torch.frexp(weight.double())
    return torch.ldexp((mantissa * 2**16).round(), exponent - 16).float()


def stands_for(weight: torch.Tensor, bits: int | None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight [N, K] as it is kept beside activations of a dtype, in fp32."""
    if bits is None and dtype == torch.float32:
        return upper_24_bits(weight) if weight.dtype == torch.float32 else weight.float()
    if bits is None:
        return weight.bfloat16().float()
    if bits == 8:
        numbers, scale = round_to_int8(weight)
        return numbers * scale[:, None]
    groups = weight.float().view(len(weight), -1, GROUP_SIZE)
    least, largest = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((largest - least) / 15).clamp_min(1e-6).bfloat16().float()
    least = least.bfloat16().float()
    return (((groups - least) / scale).round().clamp(0, 15) * scale + least).view(weight.shape)


def rounded(x: torch.Tensor, bits: int | None) -> torch.Tensor:
    """[.., K]: beside few bits in int8, 32 numbers at a time."""
    if bits is None:
        return x
    groups = x.unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((groups / scale).round() * scale).flatten(-2)


def product(weight: torch.Tensor, bits: int | None, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [T, K] by a weight [N, K] as it is kept; beside bf16 weights 4 rows and more are rounded to bf16."""
    if bits is None and len(x) >= 4 and dtype == torch.bfloat16 and "avx512_bf16" in cpu_flags():
        x = x.bfloat16().float()
    return (rounded(x, bits).double() @ stands_for(weight, bits, dtype).double().t()).float()
