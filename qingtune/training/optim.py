"""Parameter groups, optimizers, and schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from qingtune.config.training import TrainConfig
from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.training.adamw8bit import AdamW8bit

Schedule = Callable[[int], float]


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float, ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and other vectors do not.

    Args:
        named: the trained parameters by name.
        weight_decay: of matrices.
        ratio: LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): B matrices learn at this many times the
            learning rate, and so do vectors, as in PEFT's create_loraplus_optimizer. A group's factor on the schedule
            is under `lr_ratio`.
    """
    parameters = list(named)
    quick = {id(p) for name, p in parameters if name.endswith("lora_B") or p.ndim < 2} if ratio != 1 else set[int]()
    matrices = [p for _, p in parameters if p.ndim >= 2]
    groups = [
        {"params": [p for p in matrices if id(p) not in quick], "weight_decay": weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in matrices if id(p) in quick], "weight_decay": weight_decay, "lr_ratio": ratio},
        {"params": [p for _, p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr_ratio": ratio},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    config: TrainConfig, named: Iterable[tuple[str, torch.nn.Parameter]], device: torch.device
) -> tuple[torch.optim.Optimizer, str | None]:
    """The optimizer that the configuration names, and a line for the user if another one replaces it."""
    assert config.learning_rate is not None
    groups = parameter_groups(named, config.weight_decay, config.loraplus_lr_ratio or 1.0)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate), None
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim in ("adamw_torch", "adamw_torch_fused"):
        fused = config.optim == "adamw_torch_fused" and device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, **adam, fused=fused), None
    if device.type != "cuda":
        if config.optim in EIGHT_BITS and device.type == "cpu":
            return AdamW8bit(groups, **adam), None
        return torch.optim.AdamW(groups, **adam, fused=device.type == "cpu"), (
            f"optim {config.optim} needs an NVIDIA GPU; AdamW with fp32 states is used instead."
        )
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "adamw_bnb_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    }
    return kinds[config.optim](groups, **adam), None


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of warm-up: warmup_steps, as a number or a share, or else warmup_ratio's share, rounded up."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil((config.warmup_steps or config.warmup_ratio) * total_steps)


def make_schedule(kind: str, peak: float, warmup: int, total: int) -> Schedule:
    """The learning rate of each step, counted from 0; the same values as Transformers' schedules of these names.

    Args:
        kind: linear, cosine, constant, constant_with_warmup, polynomial (linear to 1e-7) or inverse_sqrt.
        peak: learning rate after the warm-up.
        warmup: steps of linear warm-up from 0.
        total: all steps, warm-up included.
    """

    def progress(step: int) -> float:
        return (step - warmup) / max(1, total - warmup)

    last = min(1e-7, peak)
    falls: dict[str, Callable[[int], float]] = {
        "linear": lambda step: max(0.0, 1 - progress(step)),
        "cosine": lambda step: max(0.0, 0.5 * (1 + math.cos(math.pi * progress(step)))),
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "polynomial": lambda step: max(0.0, 1 - progress(step)) * (1 - last / peak) + last / peak,
        "inverse_sqrt": lambda step: 1 / math.sqrt(1 + (step - warmup) / (warmup or 10_000)),
    }
    fall = falls[kind]

    def learning_rate(step: int) -> float:
        warming = kind != "constant" and step < warmup
        return peak * (step / warmup if warming else fall(step))

    return learning_rate
