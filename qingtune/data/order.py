"""Order of the samples, and how a micro-batch is cut into passes; from numbers alone, without torch.

The order is a function of the seed and the step alone, so that a run can resume at any step without replaying the data.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qingtune.config.training import TrainConfig


def tokens_computed(lengths: Sequence[int], shared: Sequence[int]) -> int:
    """Tokens of samples laid end to end, what all of them begin with counted once; arguments as in sizes_of_groups."""
    return sum(lengths) - (len(lengths) - 1) * min(shared[1:], default=0)


def sizes_of_groups(lengths: Sequence[int], most_tokens: int, shared: Sequence[int] | None = None) -> list[int]:
    """How many samples go into each of the fewest groups of about equal length, in order.

    Args:
        lengths: of the samples, in tokens.
        most_tokens: of a group; single samples may be longer.
        shared: tokens with which each sample begins like the one before it, and which count once in a group; what a
            group shares is the least of them. The first one is not looked at. None where nothing is shared.
    """
    shared = shared or [0] * len(lengths)
    fewest = len(_filled(lengths, most_tokens, shared))
    even = bisect_left(range(most_tokens), -fewest, key=lambda limit: -len(_filled(lengths, limit, shared)))
    return _filled(lengths, even, shared)


def _filled(lengths: Sequence[int], limit: int, shared: Sequence[int]) -> list[int]:
    """Sizes of groups filled one after another as far as the limit lets them, which gives the fewest, as no group gets
    shorter by another sample."""
    sizes: list[int] = []
    apart = common = 0
    for length, alike in zip(lengths, shared, strict=True):
        apart, common = apart + length, min(common, alike)
        if not sizes or apart - sizes[-1] * common > limit:
            sizes.append(0)
            apart = common = length
        sizes[-1] += 1
    return sizes


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Plan:
    """Which samples each optimizer step sees.

    Every epoch is a fresh permutation, cut into windows of one optimizer step each; the last window of an epoch may be
    smaller. A window's samples do not depend on how it is split into micro-batches and processes.

    Attributes:
        accumulation: micro-batches of each process in a window, where samples_per_step does not say how many samples.
    """

    sample_count: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int
    samples_per_step: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, count: int, processes: int = 1) -> Plan:
        """The plan of a run over this many samples."""
        batch, wanted = config.per_device_train_batch_size, config.samples_per_step
        if wanted:  # no process waits while another one has all samples in a single micro-batch
            batch = min(batch, math.ceil(wanted / processes))
        return cls(count, batch, config.gradient_accumulation_steps, processes, config.seed, wanted)

    @property
    def window_size(self) -> int:
        """Samples an optimizer step, over all processes."""
        return self.samples_per_step or self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return math.ceil(self.sample_count / self.window_size)

    def window(self, step: int) -> NDArray[np.int64]:
        """Indices of the samples of an optimizer step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.sample_count)
        return order[place * self.window_size : (place + 1) * self.window_size]

    def micro_batches(self, step: int, process: int) -> list[NDArray[np.int64]]:
        """This process's share of a window, cut into micro-batches; may be empty in an epoch's last window."""
        window = self.window(step)
        batches = [window[start : start + self.batch_size] for start in range(0, len(window), self.batch_size)]
        return batches[process :: self.processes]
