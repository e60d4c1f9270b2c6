"""Summed cross-entropy over the trained tokens of a micro-batch.

The head runs only on rows that predict a trained token, a few hundred at a time, and each chunk's gradient is formed
right after its logits: neither the logits of a whole batch nor an fp32 copy of the head are ever held.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F

from qingtune.data.batch import Batch

CHUNK_ELEMENTS = 2**25  # logits held at a time: 128 MB in fp32


def summed_loss(model: Any, batch: Batch, *, end_to_end: bool) -> torch.Tensor:
    """The sum, not the mean, of the trained tokens' losses in nats (fp32 scalar).

    Args:
        model: a causal language model of Transformers.
        batch: on the model's device.
        end_to_end: whether the model's attention keeps samples apart; otherwise they are computed one by one.
    """
    if not end_to_end:
        return _one_by_one(model, batch)
    hidden = model.base_model(
        input_ids=batch.token_ids[None],
        position_ids=batch.positions[None],
        use_cache=False,
        sample_starts=batch.starts.tolist(),
    ).last_hidden_state[0]
    head = model.get_output_embeddings()
    return head_loss(hidden[batch.predicting], head.weight, batch.targets)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against targets, without holding the logits.

    Args:
        hidden: [N, D], any floating dtype.
        weight: [V, D], the head; gets a gradient if it asks for one.
        targets: int64 [N].

    Returns:
        fp32 scalar; zero for N = 0.
    """
    return cast("torch.Tensor", _HeadLoss.apply(hidden, weight, targets))


def head_loss_plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, for tests to compare with."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """d loss / d logits is softmax minus one-hot: known as soon as the logits are, so backward only scales."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[N, D], [V, D], [N] -> scalar."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            rows, wanted = hidden[start : start + size], targets[start : start + size, None]
            product = rows @ weight.t()
            logits = product.float()
            normaliser = logits.logsumexp(1, keepdim=True)
            loss += (normaliser - logits.gather(1, wanted)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            shares = logits.sub_(normaliser).exp_()
            shares.scatter_add_(1, wanted, shares.new_full((), -1.0).expand_as(wanted))
            grad_logits = shares.to(product.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + size] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Scale what forward kept."""
        (grad,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_weight is None else grad_weight * grad,
            None,
        )


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
