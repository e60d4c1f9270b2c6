"""Runs that stop: resumed, they end with the same weights; out of memory, they go on with less."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from gpu_parts.commands import train
from gpu_parts.scale import Result, Scale
from qingtune.kernels.decoder import TrainingDecoder

OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "sgd")
OF_BITSANDBYTES = ("paged_adamw_8bit",)


def resume(scale: Scale) -> Result:
    """Four steps at once, and two and two: the largest difference of any weight, by optimizer."""
    result = Result()
    with_bits = scale.on_gpu and importlib.util.find_spec("bitsandbytes") is not None
    for optim in (*OPTIMIZERS, *OF_BITSANDBYTES * with_bits):
        once, twice = (scale.scratch / f"{optim}-{name}" for name in ("once", "twice"))
        flags = ["--optim", optim, "--max_steps", "4", "--save_steps", "2"]
        train(scale, once, *flags)
        checkpoint = next(path for path in once.glob("checkpoint*2") if path.is_dir())
        losses, _ = train(scale, twice, *flags, "--resume_from_checkpoint", str(checkpoint))
        apart = _apart(once, twice)
        result.rows.append({"optimizer": optim, "last loss": losses[-1], "largest difference": apart})
        if not scale.on_gpu and apart:
            result.faults.append(f"{optim}: resumed weights differ by {apart:.2g}")
        for folder in (once, twice):
            shutil.rmtree(folder)
    return result


def _apart(one: Path, other: Path) -> float:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def out_of_memory(scale: Scale) -> Result:
    """A pass that does not fit is split, and the run ends with the losses of one that had room."""
    losses, _ = train(scale, scale.scratch / "roomy", "--max_steps", "2")
    add_gradients, failed = TrainingDecoder.add_gradients, [False]

    def once(self: TrainingDecoder, batch: Any, share: torch.Tensor) -> torch.Tensor:
        if not failed[0] and len(batch.starts) > 2:
            failed[0] = True
            if scale.on_gpu:  # what CUDA raises, not a stand-in for it
                torch.empty(2**60, dtype=torch.uint8, device=scale.device)
            raise MemoryError
        return add_gradients(self, batch, share)

    with mock.patch.object(TrainingDecoder, "add_gradients", once):
        again, said = train(scale, scale.scratch / "tight", "--max_steps", "2")
    result = Result([{"losses": str(losses), "after running out of memory": str(again)}])
    if "Out of memory in a pass" not in said:
        result.faults.append("running out of memory was not reported")
    bound = 2e-2 if scale.on_gpu else 1e-4
    if any(abs(one - other) > bound for one, other in zip(losses, again, strict=True)):
        result.faults.append("other losses after running out of memory")
    return result
