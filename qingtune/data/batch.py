"""Micro-batches of samples laid end to end without padding; their order is order.py's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from qingtune.data.order import sizes_of_groups
from qingtune.data.tokenize import Sample


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples laid end to end; T tokens, N trained tokens, S samples.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T]; each sample's own, from 0.
        starts: int32 [S + 1]; where each sample starts, and T.
        predicting: int64 [N]; places whose next token is trained.
        targets: int64 [N]; those next tokens.
        origins: where the samples come from.
        shared: tokens with which all samples begin, to be computed once; none of them predicts a trained token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    origins: tuple[str, ...]
    shared: int = 0

    @property
    def computed(self) -> int:
        """Tokens that a pass computes: what is shared counts once."""
        return len(self.token_ids) - (len(self.starts) - 2) * self.shared

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        tensors = (self.token_ids, self.positions, self.starts, self.predicting, self.targets)
        return Batch(
            *(tensor.to(device, non_blocking=True) for tensor in tensors), origins=self.origins, shared=self.shared
        )

    def trained_samples(self) -> Iterator[Batch]:
        """Each sample that trains a token, as its own micro-batch."""
        for number, (start, end) in enumerate(pairwise(self.starts.tolist())):
            mine = (self.predicting >= start) & (self.predicting < end)
            if bool(mine.any()):
                yield Batch(
                    token_ids=self.token_ids[start:end],
                    positions=self.positions[start:end],
                    starts=self.starts[number : number + 2] - start,
                    predicting=self.predicting[mine] - start,
                    targets=self.targets[mine],
                    origins=self.origins[number : number + 1],
                )


def collate(samples: Sequence[Sample], *, shares: bool = True) -> Batch:
    """Lay samples end to end; shares: whether a beginning that they have in common may be computed once."""
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
        shared=min(shared_beginnings(samples)[1:], default=0) if shares else 0,
    )


def shared_beginnings(samples: Sequence[Sample]) -> list[int]:
    """Tokens with which each sample begins like the one before it, short of any that predicts a trained one and of a
    whole sample; 0 for the first. All samples begin with the least of the others in common."""
    first, others = samples[:1], samples[1:]
    return [0] * len(first) + [_shared_beginning(*pair) for pair in zip(samples, others, strict=False)]


def _shared_beginning(one: Sample, other: Sample) -> int:
    limit = min(_before_the_first_trained(one), _before_the_first_trained(other))
    differs = one.token_ids[:limit] != other.token_ids[:limit]
    return int(differs.argmax()) if differs.any() else limit


def _before_the_first_trained(sample: Sample) -> int:
    """Tokens before the one that predicts the first trained one; all but the last where nothing is trained."""
    trained = sample.trained[1:]
    return int(trained.argmax()) if trained.any() else len(trained)


def split_evenly(samples: Sequence[Sample], most_tokens: int, *, shares: bool = False) -> list[list[Sample]]:
    """Cut a micro-batch into the fewest groups of about equal length, none above `most_tokens` but single samples.

    The gradient is that of the whole micro-batch, as losses are summed; only the memory is that of one group.

    Args:
        samples: of the micro-batch, in order.
        most_tokens: of a group.
        shares: whether what all samples of a group begin with is counted once, as `collate` has it.
    """
    shared = shared_beginnings(samples) if shares else None
    sizes = sizes_of_groups([len(sample.token_ids) for sample in samples], most_tokens, shared)
    return [list(samples[end - size : end]) for end, size in zip(accumulate(sizes), sizes, strict=True)]
