"""Evaluation losses of a finished run: the one of its result, and losses as perplexities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def loss_of_result(results: Mapping[str, Any], *, best_kept: bool) -> float | None:
    """The evaluation loss of the weights that a run kept, in nats per trained token; None where nothing was evaluated.

    Args:
        results: of the run's record.
        best_kept: whether the weights of the best evaluation were kept (load_best_model_at_end), if there was one.
    """
    best = results.get("best_eval_loss") if best_kept else None
    return results.get("eval_loss") if best is None else best


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
