"""Summed cross-entropy over the trained tokens of a micro-batch; the head runs only on rows that predict them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.data.batch import Batch


def summed_loss(model: Any, batch: Batch, *, end_to_end: bool) -> torch.Tensor:
    """The sum, not the mean, of the trained tokens' losses in nats (fp32 scalar).

    Args:
        model: a causal language model of Transformers.
        batch: on the model's device.
        end_to_end: whether the model's attention keeps samples apart; otherwise they are computed one by one.
    """
    if end_to_end:
        logits = model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.predicting,
            sample_starts=batch.starts.tolist(),
        ).logits[0]
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return _one_by_one(model, batch)


def _one_by_one(model: Any, batch: Batch) -> torch.Tensor:
    """The general path, right for any architecture: a forward pass for each sample, with all its logits."""
    total = torch.zeros((), device=batch.token_ids.device)
    for start, end in pairwise(batch.starts.tolist()):
        mine = (batch.predicting >= start) & (batch.predicting < end)
        if not bool(mine.any()):
            continue
        logits = model(input_ids=batch.token_ids[None, start:end], use_cache=False).logits[0]
        rows = logits[batch.predicting[mine] - start]
        total = total + F.cross_entropy(rows.float(), batch.targets[mine], reduction="sum")
    return total
