"""Which card, driver and libraries."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from gpu_parts.scale import Result, Scale

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "liger-kernel", "fla-core", "unsloth")


def part(scale: Scale) -> Result:
    """Name, memory and capability of the card; versions of what is installed."""
    rows = [{"what": "device", "is": scale.hardware.reason}]
    if scale.on_gpu:
        card = torch.cuda.get_device_properties(scale.device)
        rows += [
            {"what": "memory", "is": f"{card.total_memory / 1e9:.0f} GB"},
            {"what": "multiprocessors", "is": str(card.multi_processor_count)},
            {"what": "capability", "is": f"{card.major}.{card.minor}"},
            {"what": "CUDA", "is": str(torch.version.cuda)},
        ]
    return Result([*rows, *({"what": name, "is": _version(name)} for name in PACKAGES)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
