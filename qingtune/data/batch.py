"""Order of the samples, and micro-batches laid end to end without padding.

The order is a function of the seed and the step alone, so that a run can go on at any step without replaying the data.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from qingtune.data.tokenize import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples laid end to end; T tokens, N trained tokens, S samples.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T]; each sample's own, from 0.
        starts: int32 [S + 1]; where each sample starts, and T.
        predicting: int64 [N]; places whose next token is trained.
        targets: int64 [N]; those next tokens.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    origins: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        tensors = (self.token_ids, self.positions, self.starts, self.predicting, self.targets)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), origins=self.origins)


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end."""
    lengths = [len(sample.token_ids) for sample in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    token_ids = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    trained = np.concatenate([sample.trained for sample in samples])
    trained[starts[:-1]] = False  # a sample's first token has nothing before it that could predict it
    predicting = np.flatnonzero(trained) - 1
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        starts=torch.from_numpy(starts),
        predicting=torch.from_numpy(predicting),
        targets=torch.from_numpy(token_ids[predicting + 1]),
        origins=tuple(sample.origin for sample in samples),
    )


def split_evenly(samples: Sequence[Sample], most_tokens: int) -> list[list[Sample]]:
    """Cut a micro-batch into the fewest groups of about equal length, none above `most_tokens` but single samples.

    The gradient is that of the whole micro-batch, as losses are summed; only the memory is that of one group.
    """
    fewest = len(_filled(samples, most_tokens))
    even = bisect_left(range(most_tokens), -fewest, key=lambda limit: -len(_filled(samples, limit)))
    return _filled(samples, even)


def _filled(samples: Sequence[Sample], limit: int) -> list[list[Sample]]:
    """Groups filled one after another as far as the limit lets them, which gives the fewest."""
    groups: list[list[Sample]] = []
    room = 0
    for sample in samples:
        room -= len(sample.token_ids)
        if room < 0 or not groups:
            groups.append([])
            room = limit - len(sample.token_ids)
        groups[-1].append(sample)
    return groups


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Plan:
    """Which samples each optimizer step sees.

    Every epoch is a fresh permutation, cut into windows of one optimizer step each; the last window of an epoch may be
    smaller. A window's samples do not depend on how it is split into micro-batches and processes.
    """

    sample_count: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    @property
    def window_size(self) -> int:
        """Samples an optimizer step, over all processes."""
        return self.batch_size * self.accumulation * self.processes

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
