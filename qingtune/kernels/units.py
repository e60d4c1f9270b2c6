"""Whose weights are there: a model's units (embedding, each decoder layer, head), and how a pass holds one while it
computes with it.

On one process, and where every process holds the whole model, there is nothing to do; where layers are sharded
(training/shards.py), a unit's weights are gathered before, and its gradients are summed after.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

EMBEDDING = -1  # layers count from 0, and the head comes after the last one
_NOTHING = nullcontext()


class Units(Protocol):
    """The weights of units, which a pass holds one after another."""

    def held(self, unit: int, *, then: int | None = None, trains: bool = False) -> AbstractContextManager[None]:
        """Have a unit's weights in its modules.

        Args:
            unit: a layer's number, EMBEDDING, or the number of layers for the head.
            then: the unit that is wanted next, which may be fetched meanwhile; None for none.
            trains: whether gradients are added to the weights meanwhile.
        """
        ...


class Whole:
    """Units that are always there."""

    def held(self, unit: int, *, then: int | None = None, trains: bool = False) -> AbstractContextManager[None]:
        """Nothing to do."""
        del unit, then, trains
        return _NOTHING
