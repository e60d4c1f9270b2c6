"""What a step asks of the device: kernel launches, synchronisations, and the share of the time that it is busy."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.models import batch_of, in_training
from gpu_parts.scale import Result, Scale

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def part(scale: Scale) -> Result:
    """LoRA on the small shape, one pass a step, two steps after one that warms up."""
    result, trained = Result(), in_training(scale.small, "lora", scale)
    batch = batch_of(scale.small, scale.passes[-1], scale.sample, torch.device("cpu"))

    def step() -> None:
        trained.step(batch.to(scale.device))

    step()
    syncs = _synchronisations(step, scale)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * scale.on_gpu]
    seconds = scale.seconds(step)
    with profile(activities=activities) as seen:
        step()
        scale.wait()
    events: Any = seen.key_averages()
    operators = sum(event.count for event in events if event.key.startswith("aten::"))
    row: dict[str, Any] = {"tokens": len(batch.token_ids), "seconds": seconds, "operators": operators}
    if scale.on_gpu:
        busy = sum(event.self_device_time_total for event in events) / 1e6
        launches = sum(event.count for event in events if event.key in LAUNCHES)
        row |= {"launches": launches, "synchronisations": len(syncs), "busy": busy / seconds}
    result.rows.append(row)
    result.rows.extend({"synchronisation": place} for place in sorted(set(syncs)))
    return result


def _synchronisations(step: Any, scale: Scale) -> list[str]:
    """Where a step waits for the device; none are seen on a CPU."""
    if not scale.on_gpu:
        step()
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in caught if "synchron" in str(each.message)]
