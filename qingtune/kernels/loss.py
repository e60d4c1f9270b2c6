"""Summed cross-entropy over the trained tokens of a micro-batch.

The head runs only on rows that predict a trained token. Where it is a matrix and nothing else, it runs on a few hundred
rows at a time, and each chunk's gradient is formed right after its logits: neither the logits of a whole batch nor an
fp32 copy of the head are ever held.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F

from qingtune.data.batch import Batch
from qingtune.kernels.elementwise import cap_in_place
from qingtune.kernels.footprint import CHUNK_ELEMENTS, ROWS_AT_A_TIME, VOCABULARY_TILE
from qingtune.kernels.native.elementwise import native
from qingtune.kernels.native.products import reads_as_stored
from qingtune.kernels.workspace import Workspace


def summed_loss(model: Any, batch: Batch, *, plain_head: bool) -> torch.Tensor:
    """The sum, not the mean, of the trained tokens' losses in nats (fp32 scalar).

    Args:
        batch: on the model's device; of one sample, unless the model keeps samples that lie end to end apart.
        plain_head: whether logits are the head's weight times the hidden states, so that they need not all be held.
    """
    inputs = {"input_ids": batch.token_ids[None], "use_cache": False}
    if len(batch.starts) > 2:  # else positions are the model's own
        inputs["position_ids"] = batch.positions[None]
    if plain_head:
        hidden = model.base_model(**inputs)[0][0]
        return head_loss(hidden[batch.predicting], model.get_output_embeddings().weight, batch.targets)
    # What the model applies after its head: soft caps, scales. A few old architectures' forward takes no rows.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=batch.predicting).logits[0]
    else:
        logits = model(**inputs).logits[0, batch.predicting]
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against targets, fp32 scalar, without holding the logits.

    Args:
        hidden: [N, D], any floating dtype.
        weight: [V, D], the head; gets a gradient if it asks for one.
        targets: int64 [N].
    """
    return cast("torch.Tensor", _HeadLoss.apply(hidden, weight, targets))


def chunked_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    workspace: Workspace,
    *,
    scale: torch.Tensor | None = None,
    cap: float | None = None,
    grad_hidden: torch.Tensor | None = None,
    grad_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed cross-entropy and, where asked for, `scale` times its gradients, a few hundred rows at a time.

    d loss / d logits is softmax minus one-hot, known as soon as the logits are; it takes their place.

    Args:
        hidden: [N, D].
        weight: [V, D]; taken a tile of rows at a time if it is converted.
        targets: int64 [N].
        workspace: holds one chunk of logits, in hidden's dtype, and a few rows of them in fp32.
        scale: scalar; None for 1.
        cap: c of c tanh(logit / c), which are the logits then; None for logits as they are.
        grad_hidden: [N, D], overwritten.
        grad_weight: [V, D], added to; a tile of rows at a time if its dtype is not hidden's.

    Returns:
        fp32 scalar (fp64 for fp64), not scaled.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    converts = weight.dtype != hidden.dtype and not reads_as_stored(hidden.dtype, hidden.device)
    tiles = _tiles(weight.shape[0], VOCABULARY_TILE)
    chunks = -(-hidden.shape[0] * weight.shape[0] // CHUNK_ELEMENTS)
    for start, end in _tiles(hidden.shape[0], -(-hidden.shape[0] // max(chunks, 1))):
        rows = hidden[start:end]
        logits = workspace.take("head.logits", (len(rows), weight.shape[0]), hidden.dtype)
        if converts:
            for a, b in tiles:
                part = workspace.cast("weight", weight[a:b], hidden.dtype)
                logits[:, a:b].copy_(workspace.product(rows, part.t(), hidden.dtype))
        else:
            workspace.multiply(rows, weight.t(), logits)
        loss += _loss_and_gradient(logits, targets[start:end], scale, cap, workspace)
        if grad_hidden is not None and converts:
            total = torch.zeros(rows.shape, dtype=wide, device=rows.device)
            for a, b in tiles:
                part = workspace.cast("weight", weight[a:b], hidden.dtype)
                workspace.accumulate(total, workspace.product(logits[:, a:b], part, hidden.dtype))
            grad_hidden[start:end] = total
        elif grad_hidden is not None:
            workspace.multiply(logits, weight, grad_hidden[start:end])
        if grad_weight is not None:
            for a, b in tiles if grad_weight.dtype != hidden.dtype else [(0, len(grad_weight))]:
                workspace.add_product(grad_weight[a:b], logits[:, a:b].t(), rows)
    return loss


def _tiles(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | None, cap: float | None, workspace: Workspace
) -> torch.Tensor:
    """Put the scaled gradient in the place of the logits, [n, V], before they are capped; returns the summed loss."""
    if cap is None:
        return _softmax_minus_one_hot(logits, targets, scale, workspace)
    slopes = cap_in_place(logits, cap, workspace.take("head.slopes", logits.shape, logits.dtype))
    loss = _softmax_minus_one_hot(logits, targets, scale, workspace)
    logits.mul_(slopes)
    return loss


def _softmax_minus_one_hot(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | None, workspace: Workspace
) -> torch.Tensor:
    """Put the scaled gradient in the place of the logits, [n, V]; returns the rows' summed loss."""
    if c := native(logits):
        return c.cross_entropy(logits, targets, 1.0 if scale is None else float(scale)).sum().float()
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=logits.device)
    size = ROWS_AT_A_TIME if logits.device.type == "cpu" else len(logits)
    for start, end in _tiles(len(logits), size):
        rows, wanted = logits[start:end], targets[start:end, None]
        shares = workspace.take("head.rows", rows.shape, wide).copy_(rows)  # mixed dtypes would be copied again
        largest = shares.amax(1, keepdim=True)
        shares.sub_(largest).exp_()
        total = shares.sum(1, keepdim=True)
        loss += (total.log() + largest - rows.gather(1, wanted)).sum()
        shares.scatter_add_(1, wanted, -total)
        rows.copy_(shares.mul_(total.reciprocal_() if scale is None else scale / total))
    return loss


class _HeadLoss(torch.autograd.Function):
    """chunked_head_loss for models whose layers autograd differentiates: backward only scales what forward kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[N, D], [V, D], [N] -> scalar."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        return chunked_head_loss(
            hidden, weight, targets, Workspace(hidden.device), grad_hidden=grad_hidden, grad_weight=grad_weight
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Scale what forward kept."""
        of_hidden, of_weight = (None if kept is None else kept * grad_outputs[0] for kept in ctx.saved_tensors)
        return of_hidden, of_weight, None
