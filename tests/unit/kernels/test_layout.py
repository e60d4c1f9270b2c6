"""A layout holds samples and targets whole, a common beginning once; its blocks hide what a row may not see."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.data.batch import Batch, collate
from qingtune.data.tokenize import Sample
from qingtune.kernels import layout as layouts
from qingtune.kernels.layout import Block, Layout, Segment, fill_up, lay_out, make_blocks

CPU = torch.device("cpu")
Text = list[tuple[int, bool]]  # token and whether it is trained


def batch_of(*texts: Text) -> Batch:
    arrays = [(np.array([t for t, _ in text], np.int32), np.array([m for _, m in text], np.bool_)) for text in texts]
    return collate([Sample(tokens, trained, f"a:{number}") for number, (tokens, trained) in enumerate(arrays)])


def plain(tokens: str, trained: str = "") -> Text:
    """Letters as tokens; those in `trained` follow and are trained."""
    return [(ord(letter), False) for letter in tokens] + [(ord(letter), True) for letter in trained]


def own_segments(layout: Layout) -> tuple[int, list[Segment]]:
    """Length of the shared beginning, and the samples' segments."""
    shared = layout.segments[-1].shared
    return shared, list(layout.segments[1:] if shared else layout.segments)


def expected_prefix(batch: Batch) -> int:
    """Brute force: the longest beginning that every sample has, continues, and predicts nothing trained in."""
    starts = batch.starts.tolist()
    texts = [batch.token_ids[a:b].tolist() for a, b in pairwise(starts)]
    predicting = set(batch.predicting.tolist())
    length = 0
    while len(texts) > 1 and all(len(text) > length + 1 for text in texts):
        if len({text[length] for text in texts}) > 1 or any(start + length in predicting for start in starts[:-1]):
            break
        length += 1
    return length


def check(batch: Batch, share_prefix: bool) -> int:
    layout = lay_out(batch, share_prefix=share_prefix)
    shared, own = own_segments(layout)
    assert shared == (expected_prefix(batch) if share_prefix else 0)
    edges = [(segment.start, segment.end) for segment in layout.segments]
    assert [0, *(end for _, end in edges)] == [*(start for start, _ in edges), len(layout.token_ids)]
    assert layout.segments[0].shared == 0
    assert all(segment.start < segment.end for segment in layout.segments)
    starts = batch.starts.tolist()
    pairs = []
    for segment, start, end in zip(own, starts, starts[1:], strict=False):
        assert (segment.shared, segment.keys) == (shared, end - start)
        places = torch.tensor([*range(shared), *range(segment.start, segment.end)])
        assert layout.token_ids[places].equal(batch.token_ids[start:end])
        assert layout.positions[places].equal(batch.positions[start:end])
        mine = (layout.predicting >= segment.start) & (layout.predicting < segment.end)
        rows = layout.predicting[mine] - segment.start + shared + start
        pairs += list(zip(rows.tolist(), layout.targets[mine].tolist(), strict=True))
    assert pairs == list(zip(batch.predicting.tolist(), batch.targets.tolist(), strict=True))
    assert len(layout.predicting) == len(pairs)
    assert (layout.predicting >= shared).all()
    return shared


# --- Layouts ---------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=7)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    prefix = draw(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([False, False, False, True])), max_size=6))
    return batch_of(*([*prefix, *text] for text in draw(st.lists(TEXTS, min_size=1, max_size=4))))


@settings(max_examples=200, deadline=None)
@given(batch=batches(), share_prefix=st.booleans())
def test_a_layout_keeps_every_sample_and_every_target(batch: Batch, share_prefix: bool) -> None:
    check(batch, share_prefix)


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        ([plain("ask", "answer")], 0),
        ([plain("ask", "yes"), plain("ask", "no")], 2),  # k predicts a trained token
        ([plain("ask", "yes")] * 3, 2),
        ([plain("ask"), plain("ask a", "b")], 2),  # the first would have nothing of its own left
        ([plain("ask"), plain("ask")], 2),
        ([plain("task", "a"), plain("ask", "a")], 0),
        ([plain("a"), plain("ask", "b")], 0),
        ([plain("a", "b"), plain("a long way")], 0),
        ([plain("a long road"), plain("a long way", "b"), plain("a lone wolf")], 5),
    ],
)
def test_the_shared_beginning_ends_before_what_a_sample_has_alone(texts: list[Text], shared: int) -> None:
    assert check(batch_of(*texts), share_prefix=True) == shared
    assert check(batch_of(*texts), share_prefix=False) == 0


def test_a_trained_token_within_the_common_beginning_ends_what_is_shared() -> None:
    turns = [*plain("abcd", "ef"), *plain("gh")]
    assert check(batch_of([*turns, *plain("i", "j")], [*turns, *plain("k", "l")]), share_prefix=True) == 3


# --- Blocks ----------------------------------------------------------------------------------------------------------


def seen(segment: Segment, block: Block, row: int) -> set[int]:
    """Places in the layout that a block's row sees."""
    places = [*range(segment.shared), *range(segment.start, segment.end)]
    assert block.hidden.shape == (block.last - block.first, block.end - block.masked_from)
    assert len(block.passed) == block.last - block.first
    hidden = torch.nonzero(block.hidden[row - block.first])[:, 0] + block.masked_from
    passed = torch.nonzero(block.passed[row - block.first])[:, 0] + block.start
    return {places[key] for key in range(block.start, block.end)} - {places[key] for key in [*hidden, *passed]}


@st.composite
def asked(draw: st.DrawFn) -> tuple[tuple[Segment, ...], list[int]]:
    shared = draw(st.integers(0, 5))
    segments, place = [Segment(0, shared, 0)] if shared else [], shared
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)):
        segments.append(Segment(place, place + length, shared))
        place += length
    rows = draw(st.just(set(range(place))) | st.sets(st.integers(0, place - 1)))
    return tuple(segments), sorted(rows)


@settings(max_examples=150, deadline=None)
@given(case=asked(), size=st.integers(1, 6), window=st.none() | st.integers(1, 18))
def test_each_row_that_asks_sees_the_shared_beginning_and_its_own_past_as_far_as_its_window_goes(
    case: tuple[tuple[Segment, ...], list[int]], size: int, window: int | None
) -> None:
    segments, rows = case
    with mock.patch.object(layouts, "QUERY_BLOCK", size):
        found = make_blocks(segments, np.array(rows, np.int64), CPU, window)
    assert tuple(segment for segment, _ in found) == segments
    numbers = []
    for segment, blocks in found:
        for block in blocks:
            assert 0 < block.last - block.first <= size
            for number in range(block.first, block.last):
                row = rows[number]
                assert segment.start <= row < segment.end
                past = [*range(segment.shared), *range(segment.start, row + 1)]
                assert seen(segment, block, number) == set(past[-(window or len(past)) :])
                numbers.append(number)
    assert numbers == list(range(len(rows)))


def test_blocks_of_a_segment_are_about_equally_long() -> None:
    ((_, blocks),) = make_blocks((Segment(0, 600, 0),), np.arange(600), CPU)
    assert [block.last - block.first for block in blocks] == [200, 200, 200]
    ((_, blocks),) = make_blocks((Segment(0, 256, 0),), np.arange(256), CPU)
    assert len(blocks) == 1


def test_keys_that_no_window_reaches_are_left_out() -> None:
    with mock.patch.object(layouts, "QUERY_BLOCK", 4):
        ((_, blocks),) = make_blocks((Segment(0, 12, 0),), np.arange(12), CPU, 3)
    assert [(block.start, block.end) for block in blocks] == [(0, 4), (2, 8), (6, 12)]


def test_blocks_are_made_once_and_a_window_that_reaches_all_is_none() -> None:
    layout = lay_out(batch_of(plain("a question", "yes"), plain("another", "no")), share_prefix=False)
    assert layout.blocks(13) is layout.blocks()
    assert layout.blocks(12) is not layout.blocks()
    assert layout.blocks(12) is layout.blocks(12)
    assert layout.blocks(12) is not layout.blocks(12, predicting=True)


def test_a_layout_asks_for_all_rows_or_for_those_that_predict() -> None:
    layout = lay_out(batch_of(plain("ask", "yes"), plain("ask", "no"), plain("as well")), share_prefix=True)
    (_, first), *_ = layout.blocks()
    assert sum(b.last - b.first for _, blocks in layout.blocks() for b in blocks) == len(layout.token_ids)
    assert [(b.first, b.last) for b in first] == [(0, 2)]
    assert [[(b.first, b.last) for b in blocks] for _, blocks in layout.blocks(predicting=True)] == [
        [],
        [(0, 3)],
        [(3, 5)],
        [],
    ]


@pytest.mark.parametrize("length", [7, 8, 9, 16])
def test_filling_up_adds_a_sample_that_nothing_else_sees(length: int) -> None:
    layout = lay_out(batch_of(plain("a" * (length - 3), "yes")), share_prefix=False)
    filled = fill_up(layout)
    end = -(-length // 8) * 8
    assert len(filled.token_ids) == len(filled.positions) == end
    assert filled.token_ids[:length].equal(layout.token_ids)
    assert filled.positions[:length].equal(layout.positions)
    added = (Segment(length, end, 0),) if end > length else ()
    assert filled.segments == layout.segments + added
    assert filled.predicting is layout.predicting
    assert filled.targets is layout.targets
