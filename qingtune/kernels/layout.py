"""How a micro-batch lies in memory: samples end to end, a beginning that all of them share held once.

Samples of one task often begin alike (system prompt, instruction). Unless adapter dropout makes them differ, that
prefix gives the same keys and values in every sample, so it is computed once and the gradients of all samples meet
in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from qingtune.data.batch import Batch
from qingtune.kernels.footprint import QUERY_BLOCK, ROWS_MULTIPLE

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Segment:
    """Tokens start..end of the layout, which see `shared` tokens at the layout's beginning and then each other."""

    start: int
    end: int
    shared: int

    @property
    def keys(self) -> int:
        """Keys that the segment's last token sees."""
        return self.shared + self.end - self.start


@dataclass(frozen=True)
class Block:
    """Query rows first..last of one segment, computed together; what they see are its keys from `start` to `end`.

    Attributes:
        masked_from: the first key that is later than some of the rows.
        hidden: bool [last - first, end - masked_from], True where a row does not see a key as it is later.
        passed: bool [last - first, n], True where a row's window does not reach one of the first n keys.
    """

    first: int
    last: int
    start: int
    end: int
    masked_from: int
    hidden: torch.Tensor
    passed: torch.Tensor

    @property
    def seen(self) -> slice:
        """The keys that some of the rows see."""
        return slice(self.start, self.end)

    @cached_property
    def spans(self) -> torch.Tensor:
        """int64 [2, last - first], the first key that each row sees, the one after its last; counted from `start`."""
        return torch.stack([self.passed.sum(1), self.end - self.start - self.hidden.sum(1)])


@dataclass(frozen=True)
class Lying:
    """Where segments and what their rows see lie, as kernels in C take it.

    Attributes:
        segments: int64 [segments, 5]: shared, start, end of each, the first of its query rows, the one after its last.
        spans: int64 [2, N], the first key that each row sees, the one after its last; counted in its segment.
    """

    segments: torch.Tensor
    spans: torch.Tensor


class Blocks(list[tuple[Segment, list[Block]]]):
    """The blocks of each segment."""

    @cached_property
    def lying(self) -> Lying:
        """The same without its division into blocks, made once."""
        rows, last = list[list[int]](), 0
        for segment, blocks in self:
            first, last = last, blocks[-1].last if blocks else last
            rows.append([segment.shared, segment.start, segment.end, first, last])
        spans = [block.spans + block.start for _, blocks in self for block in blocks]
        return Lying(torch.tensor(rows), torch.cat([torch.zeros(2, 0, dtype=torch.int64), *spans], 1))


@dataclass(frozen=True)
class Lengths:
    """Where each segment's queries and keys lie; K keys in all, those of the shared beginning once for each segment.

    Attributes:
        queries: int32 [segments + 1], where each one's queries start.
        keys: int32 [segments + 1], where each one's keys start.
        places: int64 [K], the token of the layout that each key belongs to.
        most_queries: of one segment; likewise most_keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    places: torch.Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Layout:
    """A micro-batch as the decoder computes it; T tokens, N trained tokens.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T].
        segments: in order, together all of T.
        predicting: int64 [N], ascending; rows whose next token is trained.
        targets: int64 [N].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    predicting: torch.Tensor
    targets: torch.Tensor

    @cached_property
    def longest(self) -> int:
        """Keys of the longest segment."""
        return max(segment.keys for segment in self.segments)

    @cached_property
    def _blocks(self) -> dict[tuple[int | None, bool], Blocks]:
        return {}

    def blocks(self, window: int | None = None, *, predicting: bool = False) -> Blocks:
        """Blocks of attention, made once.

        Args:
            window: tokens that a row sees at most, itself among them; None for all before it.
            predicting: whether only predicting rows ask, query rows being counted among them; otherwise all do.
        """
        key = window if window is not None and window < self.longest else None, predicting
        if key not in self._blocks:
            rows = self.predicting.cpu().numpy() if predicting else np.arange(len(self.token_ids))
            self._blocks[key] = make_blocks(self.segments, rows, self.token_ids.device, key[0])
        return self._blocks[key]

    def by_length(self, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of samples of at most `limit` tokens, and those of longer ones, ascending; what samples share is counted
        with the longest of them."""
        keys = [segment.keys for segment in self.segments]
        if any(segment.shared for segment in self.segments):
            keys[0] = self.longest
        sizes = [segment.end - segment.start for segment in self.segments]
        longer = np.repeat(np.array(keys) > limit, sizes)
        short, long = (torch.from_numpy(np.flatnonzero(rows)).to(self.token_ids.device) for rows in (~longer, longer))
        return short, long

    @cached_property
    def lengths(self) -> Lengths:
        """Lengths of the segments, for attention in which every token asks."""
        device = self.token_ids.device
        queries = [segment.end - segment.start for segment in self.segments]
        keys = [segment.keys for segment in self.segments]
        parts = [places for s in self.segments for places in (np.arange(s.shared), np.arange(s.start, s.end))]
        q_starts, k_starts = (torch.from_numpy(np.cumsum([0, *n], dtype=np.int32)).to(device) for n in (queries, keys))
        places = torch.from_numpy(np.concatenate(parts)).to(device)
        return Lengths(q_starts, k_starts, places, max(queries), self.longest)


def make_blocks(
    segments: tuple[Segment, ...], rows: NDArray[np.int64], device: torch.device, window: int | None = None
) -> Blocks:
    """Cut the query rows (ascending places in the layout) of each segment into blocks of about equal size; keys that no
    row's window reaches are left out."""
    result = Blocks()
    for segment in segments:
        first, last = (int(place) for place in np.searchsorted(rows, [segment.start, segment.end]))
        visible = rows[first:last] - segment.start + segment.shared + 1
        count = -(-len(visible) // QUERY_BLOCK)
        edges = [first + len(visible) * number // max(count, 1) for number in range(count + 1)]
        blocks: list[Block] = []
        for a, b in pairwise(edges):
            seen = visible[a - first : b - first]
            masked_from, end = int(seen[0]), int(seen[-1])
            oldest = seen - seen if window is None else np.maximum(seen - window, 0)
            start = int(oldest[0])
            hidden = np.arange(masked_from, end)[None] >= seen[:, None]
            passed = np.arange(start, int(oldest[-1]))[None] < oldest[:, None]
            masks = (torch.from_numpy(mask).to(device) for mask in (hidden, passed))
            blocks.append(Block(a, b, start, end, masked_from, *masks))
        result.append((segment, blocks))
    return result


def lay_out(batch: Batch, *, share_prefix: bool) -> Layout:
    """Lay a micro-batch out; with share_prefix what all samples begin with is held once."""
    bounds = list(pairwise(batch.starts.tolist()))
    shared = batch.shared
    if not (shared and share_prefix):
        segments = tuple(Segment(start, end, 0) for start, end in bounds)
        return Layout(batch.token_ids, batch.positions, segments, batch.predicting, batch.targets)
    kept = torch.cat([torch.arange(shared), *(torch.arange(start + shared, end) for start, end in bounds)])
    kept = kept.to(batch.token_ids.device)
    segments = [Segment(0, shared, 0)]
    for start, end in bounds:
        place = segments[-1].end
        segments.append(Segment(place, place + end - start - shared, shared))
    return Layout(
        token_ids=batch.token_ids[kept],
        positions=batch.positions[kept],
        segments=tuple(segments),
        predicting=torch.searchsorted(kept[shared:], batch.predicting) + shared,
        targets=batch.targets,
    )


def fill_up(layout: Layout) -> Layout:
    """The layout with a multiple of 8 tokens: a sample that trains nothing is added where there are too few."""
    end = len(layout.token_ids)
    if not (filler := -end % ROWS_MULTIPLE):
        return layout
    return replace(
        layout,
        token_ids=F.pad(layout.token_ids, (0, filler)),
        positions=F.pad(layout.positions, (0, filler)),
        segments=(*layout.segments, Segment(end, end + filler, 0)),
    )
