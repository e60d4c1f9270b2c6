"""How fast this machine multiplies matrices, measured in a second or two: the ground for the time of a first run."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from qingtune.kernels.device import choose_hardware
from qingtune.machine.resources import Machine
from qingtune.output.console import say
from qingtune.planning.speed import PRODUCTS, Speed, keep_speed

ROWS = 1024  # tokens of a pass
SECONDS = 2.0
SHAPES = ((4864, 896), (896, 4864), (896, 896))  # out and in features of a model of 0.5B parameters
SHAPES_ON_GPU = ((18944, 3584), (3584, 18944), (3584, 3584))  # of one of 7B, as smaller ones leave a GPU idle


def calibrate(cache: Path, machine: Machine) -> None:
    """Measure, and keep the result in the cache.

    Raises:
        OSError: the cache cannot be written.
    """
    hardware = choose_hardware(bf16=None if machine.itemsize == 2 else False)
    rate = product_rate(hardware.device, hardware.dtype)
    say(f"Matrix products: {rate / 1e9:,.0f} GFLOP/s in {str(hardware.dtype).removeprefix('torch.')}.")
    keep_speed(cache, Speed(machine.name, machine.dtype, PRODUCTS, 1.0, rate))


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """FLOP/s of products in the shapes and layouts that a small model trains with, median over a few seconds."""
    products: list[tuple[torch.Tensor, torch.Tensor]] = []
    for out, into in SHAPES if device.type == "cpu" else SHAPES_ON_GPU:
        x, y = (torch.randn(ROWS, width, device=device).to(dtype) for width in (into, out))
        weight = torch.randn(out, into, device=device).to(dtype)
        products += [(x, weight.t()), (y, weight)]
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)
    outs = [torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=device) for a, b in products]
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 3:
        began = time.perf_counter()
        for (a, b), out in zip(products, outs, strict=True):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return flops / median(times)
