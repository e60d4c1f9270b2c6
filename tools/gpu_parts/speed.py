"""Tokens a second and memory, allocated and reserved, next to what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gpu_parts.models import METHODS, batch_of, in_training
from gpu_parts.scale import Result, Scale, Shape

MOST_OFF = 0.05  # of the plan
LEAST_PLANNED = 1e9  # below which fixed costs that no plan counts decide


def small(scale: Scale) -> Result:
    """Every method and pass size on the small shape."""
    result = Result()
    for method in METHODS:
        scale.clear()
        _measure(scale.small, method, scale.passes, scale, result, recompute=False)
    return result


def large(scale: Scale) -> Result:
    """LoRA and 4-bit QLoRA on the large shape, with nothing kept but each layer's input."""
    result = Result()
    for method in ("lora", "qlora4"):
        scale.clear()
        _measure(scale.large, method, scale.large_passes, scale, result, recompute=True)
    return result


def _measure(
    shape: Shape, method: str, passes: Sequence[int], scale: Scale, result: Result, *, recompute: bool
) -> None:
    trained = in_training(shape, method, scale, recompute)
    for tokens in passes:
        trained.decoder.workspace.clear()
        scale.clear()
        batch = batch_of(shape, tokens, scale.sample, scale.device)
        count = len(batch.token_ids)
        loss = float(trained.step(batch)) / len(batch.targets)
        seconds = scale.seconds(partial(trained.step, batch))
        row: dict[str, Any] = {"method": method, "tokens": count, "tokens/s": count / seconds, "loss": loss}
        planned = trained.planned_bytes(count, scale.sample)
        row["planned GB"] = planned / 1e9
        if scale.on_gpu:
            allocated = torch.cuda.max_memory_allocated(scale.device)
            row["allocated GB"] = allocated / 1e9
            row["reserved GB"] = torch.cuda.max_memory_reserved(scale.device) / 1e9
            if planned > LEAST_PLANNED and abs(allocated / planned - 1) > MOST_OFF:
                result.faults.append(f"{method}, {count:,} tokens: {allocated / planned:.2f} of the plan")
        result.rows.append(row)
