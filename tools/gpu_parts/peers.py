"""The same work by others on the same card: Transformers' modules with PEFT's LoRA, and Unsloth if it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from gpu_parts.models import batch_of, random_model
from gpu_parts.scale import Result, Scale

RANK = 16


def part(scale: Scale) -> Result:
    """Tokens a second of LoRA on the small shape, samples of one length, so that none of them pads."""
    result = Result()
    tokens = scale.passes[min(1, len(scale.passes) - 1)]
    for recompute in (False, True):
        result.rows.append(_transformers(scale, tokens, recompute=recompute))
        scale.clear()
    if importlib.util.find_spec("unsloth") is None:
        result.rows.append({"system": "Unsloth", "note": "not installed"})
    return result


def _transformers(scale: Scale, tokens: int, *, recompute: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    base = random_model(scale.small, scale.hardware.dtype, scale.device)
    model: Any = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch = batch_of(scale.small, tokens, scale.sample, scale.device)
    ids = batch.token_ids.view(-1, scale.sample)
    labels = ids.clone()
    labels[:, : scale.sample // 2] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row: dict[str, Any] = {
        "system": f"Transformers, PEFT, SDPA{', checkpointing' if recompute else ''}",
        "tokens": ids.numel(),
        "tokens/s": ids.numel() / scale.seconds(step, 2),
    }
    if scale.on_gpu:
        row["allocated GB"] = torch.cuda.max_memory_allocated(scale.device) / 1e9
    return row
