"""Weights rounded to few bits, written plainly."""

from __future__ import annotations

import torch

from qingtune.answering.decoder.packed import GROUP_SIZE, round_to_int4, round_to_int8


def stands_for(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight after rounding to 4 or 8 bits, fp32."""
    if bits == 8:
        numbers, scale = round_to_int8(weight)
        return numbers * scale[:, None]
    numbers, scale, middle = round_to_int4(weight)
    groups = (numbers.view(len(weight), -1, GROUP_SIZE) - 8) * scale.float()[..., None]
    return (groups + middle.float()[..., None]).view(weight.shape)
