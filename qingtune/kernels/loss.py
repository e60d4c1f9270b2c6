"""Summed cross-entropy over the trained tokens of a micro-batch.

The head runs only on rows that predict a trained token. Where it is a matrix and nothing else, neither the logits of a
whole batch nor an fp32 copy of the head are ever held: a head that is not trained takes a few thousand of its rows at a
time, a trained one a few hundred hidden states at a time.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F

from qingtune.data.batch import Batch
from qingtune.kernels.elementwise import cap_in_place
from qingtune.kernels.footprint import (
    CHUNK_ELEMENTS,
    HEAD_ROWS,
    ROWS_AT_A_TIME,
    ROWS_MULTIPLE,
    VOCABULARY_TILE,
    head_tile,
)
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


def head_loss_and_gradients(
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
    """Summed cross-entropy and, where asked for, `scale` times its gradients.

    Args:
        hidden: [N, D].
        weight: [V, D]; taken a tile of rows at a time if it is converted.
        targets: int64 [N].
        workspace: holds the logits of one tile or chunk, in hidden's dtype.
        scale: scalar; None for 1.
        cap: c of c tanh(logit / c), which are the logits then; None for logits as they are.
        grad_hidden: [N, D], overwritten.
        grad_weight: [V, D], added to; a tile of rows at a time if its dtype is not hidden's.

    Returns:
        fp32 scalar (fp64 for fp64), not scaled.
    """
    if grad_weight is None:
        return _in_tiles(hidden, weight, targets, workspace, scale, cap, grad_hidden)
    return _in_chunks(hidden, weight, targets, workspace, scale, cap, grad_hidden, grad_weight)


def _in_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    workspace: Workspace,
    scale: torch.Tensor | None,
    cap: float | None,
    grad_hidden: torch.Tensor | None,
) -> torch.Tensor:
    """A tile of the head at a time, which comes from memory once: its logits, their exponentials and the product of
    these with it follow one another while it is in the cache. What was added up before is scaled whenever a larger
    logit appears (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867). Targets are left out and added in the
    end: a share near 1 in 16 bits would lose what it lacks to 1, which is their gradient. Rows are filled up to a
    multiple of 8.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    converts = weight.dtype != hidden.dtype and not reads_as_stored(hidden.dtype, hidden.device)
    for start, end in _tiles(len(hidden), HEAD_ROWS):
        wanted, filled = F.pad(targets[start:end], (0, (start - end) % ROWS_MULTIPLE)), slice(0, end - start)
        rows = workspace.take("head.hidden", (len(wanted), hidden.shape[1]), hidden.dtype)
        rows[filled] = hidden[start:end]
        rows[end - start :] = 0
        running = _RunningSoftmax(wanted, wide, workspace)
        total = None if grad_hidden is None else workspace.take("head.total", rows.shape, wide).zero_()
        large = hidden.device.type != "cpu" and not converts
        for a, b in _tiles(len(weight), head_tile(len(weight), len(rows), large=large)):
            tile = workspace.cast("weight", weight[a:b], hidden.dtype) if converts else weight[a:b]
            logits = workspace.take("head.logits", (len(rows), b - a), hidden.dtype)
            workspace.multiply(rows, tile.t(), logits)
            slopes = _capped(logits, cap, workspace)
            running.take(logits, a)
            if total is not None:
                if slopes is not None:
                    logits.mul_(slopes)
                part = workspace.take("head.part", rows.shape, hidden.dtype)
                workspace.multiply(logits, tile, part)
                running.accumulate(total, part)
        sums, losses = running.result()
        loss += losses[filled].sum()
        if grad_hidden is not None and total is not None:
            of_targets = workspace.take("head.targets", rows.shape, weight.dtype)
            torch.index_select(weight, 0, wanted, out=of_targets)
            total.addcmul_(of_targets, running.left_to_targets(cap)[:, None], value=-1).div_(sums[:, None])
            grad_hidden[start:end] = (total if scale is None else total.mul_(scale))[filled]
    return loss


class _RunningSoftmax:
    """Softmax over columns that come a tile at a time, those of targets apart; of n rows.

    Attributes:
        rest: [n], sum of e^(x - largest) over the columns so far but for the target.
    """

    def __init__(self, targets: torch.Tensor, wide: torch.dtype, workspace: Workspace) -> None:
        self._targets, self._workspace = targets.contiguous(), workspace
        self._largest = torch.full(targets.shape, -torch.inf, dtype=wide, device=targets.device)
        self.rest, self._wanted, self._factors = (torch.zeros_like(self._largest) for _ in range(3))

    def take(self, logits: torch.Tensor, first: int) -> None:
        """The next columns, [n, w], from number `first` on, which become e^(x - largest), and 0 for targets."""
        if c := native(logits):
            c.running_softmax(logits, self._targets, first, (self._largest, self.rest, self._wanted, self._factors))
            return
        least, width = torch.finfo(self._largest.dtype).min, logits.shape[1]
        size = ROWS_AT_A_TIME if logits.device.type == "cpu" else len(logits)
        for start, end in _tiles(len(logits), size):
            rows, largest, wanted = (x[start:end] for x in (logits, self._largest, self._wanted))
            shares = self._workspace.take("head.rows", rows.shape, largest.dtype).copy_(rows)
            base = torch.maximum(largest, shares.amax(1)).clamp_min(least)
            place = (self._targets[start:end, None] - first).clamp(0, width - 1)
            here = self._targets[start:end] == place[:, 0] + first
            found = shares.gather(1, place)
            wanted.copy_(torch.where(here, found[:, 0], wanted))
            shares.scatter_(1, place, found.masked_fill_(here[:, None], -torch.inf))
            factors = torch.exp(largest - base, out=self._factors[start:end])
            rows.copy_(shares.sub_(base[:, None]).exp_())
            self.rest[start:end].mul_(factors).add_(shares.sum(1))
            largest.copy_(base)

    def accumulate(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add the product of the columns taken last, [n, D], to that of those before."""
        if total.dtype == torch.float32 and native(total) and (c := native(part)):
            c.accumulate_rows(part, self._factors, total)
        else:
            total.mul_(self._factors[:, None]).add_(part)

    def left_to_targets(self, cap: float | None) -> torch.Tensor:
        """`rest`, times the slopes of targets' capped logits: the gradient of these is that over the sum, negative."""
        return self.rest if cap is None else self.rest * (1 - (self._wanted / cap).square())

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of e^(x - largest) over all columns, and the rows' losses; [n] both."""
        apart = self._wanted - self._largest
        sums = self.rest + apart.exp()
        return sums, sums.log() - apart


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    workspace: Workspace,
    scale: torch.Tensor | None,
    cap: float | None,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor,
) -> torch.Tensor:
    """A few hundred hidden states at a time: d loss / d logits is softmax minus one-hot, known as soon as the logits
    are; it takes their place, and both gradients are products with it."""
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
        slopes = _capped(logits, cap, workspace)
        loss += _softmax_minus_one_hot(logits, targets[start:end], scale, workspace)
        if slopes is not None:
            logits.mul_(slopes)
        if grad_hidden is not None and converts:
            total = torch.zeros(rows.shape, dtype=wide, device=rows.device)
            for a, b in tiles:
                part = workspace.cast("weight", weight[a:b], hidden.dtype)
                workspace.accumulate(total, workspace.product(logits[:, a:b], part, hidden.dtype))
            grad_hidden[start:end] = total
        elif grad_hidden is not None:
            workspace.multiply(logits, weight, grad_hidden[start:end])
        for a, b in tiles if grad_weight.dtype != hidden.dtype else [(0, len(grad_weight))]:
            workspace.add_product(grad_weight[a:b], logits[:, a:b].t(), rows)
    return loss


def _capped(logits: torch.Tensor, cap: float | None, workspace: Workspace) -> torch.Tensor | None:
    """Cap logits in their place; their slopes, None without a cap."""
    if cap is None:
        return None
    return cap_in_place(logits, cap, workspace.take("head.slopes", logits.shape, logits.dtype))


def _tiles(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


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
    """The same for models whose layers autograd differentiates: backward only scales what forward kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[N, D], [V, D], [N] -> scalar."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        return head_loss_and_gradients(
            hidden, weight, targets, Workspace(hidden.device), grad_hidden=grad_hidden, grad_weight=grad_weight
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Scale what forward kept."""
        of_hidden, of_weight = (None if kept is None else kept * grad_outputs[0] for kept in ctx.saved_tensors)
        return of_hidden, of_weight, None
