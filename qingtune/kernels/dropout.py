"""Dropout that is not the slowest part of a step on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero elements of x with a probability below 1 and scale the others, so that the expectation stays."""
    if probability == 0 or x.device.type not in ("cpu", "cuda"):
        return F.dropout(x, probability)
    mask, factor = keep_mask(x.shape, probability, new_seed(), x.device)
    return (x * mask).mul_(factor)


def new_seed() -> int:
    """A seed from PyTorch's global generator on the CPU, which the training loop sets for each micro-batch."""
    return int(torch.randint(2**62, ()))


def keep_mask(shape: Sequence[int], probability: float, seed: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """Which elements stay (bool), and the factor on them; the same for the same seed.

    PyTorch draws two random words an element on a CPU, one element at a time: a fifth of a LoRA step. Here a 64-bit
    word serves four elements, so the probability is a multiple of 2^-16; the factor is that of the probability used.
    """
    dropped = min(round(probability * 2**16), 2**16 - 1)
    size = torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty((size + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[:size].view(*shape) >= dropped - 2**15
    return kept, 2**16 / (2**16 - dropped)
