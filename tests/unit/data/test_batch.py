"""Micro-batches lay samples end to end; the plan gives every sample once an epoch, however a window is split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qingtune.config.training import TrainConfig
from qingtune.data.batch import collate, split_evenly
from qingtune.data.order import Plan
from qingtune.data.tokenize import Sample

SPLITS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]


def sample(*pairs: tuple[int, bool], origin: str = "a:1") -> Sample:
    return Sample(
        np.array([p[0] for p in pairs], dtype=np.int32), np.array([p[1] for p in pairs], dtype=np.bool_), origin
    )


def random_samples(count: int) -> list[Sample]:
    """Every token id occurs once, so that an id tells its place; lengths from 1, first tokens trained or not."""
    source = np.random.default_rng(0)
    ends = np.cumsum(source.integers(1, 7, count))
    trained = source.random(ends[-1]) < 0.5
    pieces = zip(np.split(np.arange(ends[-1]), ends[:-1]), np.split(trained, ends[:-1]), strict=True)
    return [Sample(ids.astype(np.int32), mask, f"a:{number}") for number, (ids, mask) in enumerate(pieces)]


# --- Micro-batches ---------------------------------------------------------------------------------------------------


def test_samples_lie_end_to_end() -> None:
    batch = collate(
        [
            sample((10, False), (11, True), (12, True)),
            sample((20, False), (21, False), (22, True), origin="a:2"),
        ]
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21, 22]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.starts.tolist() == [0, 3, 6]
    assert batch.predicting.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [11, 12, 22]
    assert batch.origins == ("a:1", "a:2")
    kinds = [t.dtype for t in (batch.token_ids, batch.positions, batch.starts, batch.predicting, batch.targets)]
    assert kinds == [torch.int64, torch.int64, torch.int32, torch.int64, torch.int64]


def test_samples_of_one_token_and_trained_first_tokens_are_never_predicted() -> None:
    batch = collate([sample((1, True)), sample((2, True), (3, True)), sample((4, True)), sample((5, False))])
    assert batch.positions.tolist() == [0, 0, 1, 0, 0]
    assert batch.starts.tolist() == [0, 1, 3, 4, 5]
    assert batch.predicting.tolist() == [1]
    assert batch.targets.tolist() == [3]
    assert collate([sample((1, True))]).targets.tolist() == []


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_batch_predicts_what_its_samples_say_and_leaves_them_as_they_are(count: int) -> None:
    samples = random_samples(count)
    before = [(one.token_ids.copy(), one.trained.copy()) for one in samples]
    batch = collate(samples)
    expected = [token for one in samples for token in one.token_ids[1:][one.trained[1:]].tolist()]
    assert batch.targets.tolist() == expected
    assert len(expected) == sum(one.trained_tokens for one in samples)
    assert batch.token_ids[batch.predicting].tolist() == [token - 1 for token in expected]
    for one, (token_ids, trained), start, end in zip(samples, before, batch.starts, batch.starts[1:], strict=False):
        assert batch.token_ids[start:end].tolist() == token_ids.tolist() == one.token_ids.tolist()
        assert batch.positions[start:end].tolist() == list(range(len(token_ids)))
        assert one.trained.tolist() == trained.tolist()
    batch.token_ids.zero_()
    assert all((one.token_ids == ids).all() for one, (ids, _) in zip(samples, before, strict=True))


# --- Splitting a micro-batch -----------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 30), max_size=12)


def split_lengths(lengths: list[int], most_tokens: int) -> list[list[int]]:
    """Lengths of the samples of each group; the samples themselves are seen to be the same ones in the same order."""
    samples = [Sample(np.zeros(length, np.int32), np.zeros(length, np.bool_), "a:1") for length in lengths]
    groups = split_evenly(samples, most_tokens)
    whole = [one for group in groups for one in group]
    assert len(whole) == len(samples)
    assert all(mine is given_one for mine, given_one in zip(whole, samples, strict=True))
    return [[len(one.token_ids) for one in group] for group in groups]


def fewest_groups(lengths: list[int], most_tokens: int) -> int:
    """Filling each group as far as it goes is optimal where the order stays."""
    count, filled = 0, most_tokens + 1
    for length in lengths:
        count, filled = (count, filled + length) if filled + length <= most_tokens else (count + 1, length)
    return count


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, most_tokens=st.integers(1, 60))
def test_groups_hold_every_sample_and_stay_within_the_limit(lengths: list[int], most_tokens: int) -> None:
    for group in split_lengths(lengths, most_tokens):
        assert len(group) == 1 or (group and sum(group) <= most_tokens)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, most_tokens=st.integers(1, 60))
@example([3, 10, 14, 3, 8, 2], 13)
@example([*[20, 12, 16, 20, 60, 24, 40, 25, 80, 35] * 6], 100)
def test_groups_are_the_fewest(lengths: list[int], most_tokens: int) -> None:
    assert len(split_lengths(lengths, most_tokens)) == fewest_groups(lengths, most_tokens)


def test_groups_are_about_equally_long() -> None:
    assert split_lengths([3] * 8, 12) == [[3] * 4] * 2
    assert split_lengths([3] * 8, 23) == [[3] * 4] * 2  # not seven and one
    assert split_lengths([3] * 8, 24) == [[3] * 8]
    assert split_lengths([9, 1, 1, 1], 5) == [[9], [1, 1, 1]]
    assert split_lengths([], 5) == []
    assert split_lengths([9, 9], 1) == [[9], [9]]


# Samples of few different tokens, some of them trained, so that many begin alike.
ALIKE = st.lists(
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2]), st.sampled_from([False, False, True])), min_size=1, max_size=12),
    max_size=8,
)


def computed(samples: Sequence[Sample]) -> int:
    """Tokens of a pass, what all samples begin with counted once; token by token, as it is written."""
    rows = [list(zip(one.token_ids.tolist(), [*one.trained.tolist()[1:], False], strict=True)) for one in samples]
    common = 0
    if len(rows) > 1:
        while all(common < len(row) - 1 and row[common] == (rows[0][common][0], False) for row in rows):
            common += 1
    return sum(map(len, rows)) - (len(rows) - 1) * common


@settings(max_examples=300, deadline=None)
@given(texts=ALIKE, most_tokens=st.integers(1, 40))
def test_groups_count_what_their_samples_begin_with_once(texts: list[list[tuple[int, bool]]], most_tokens: int) -> None:
    samples = [sample(*text, origin=str(number)) for number, text in enumerate(texts)]
    groups = split_evenly(samples, most_tokens, shares=True)
    assert [one.origin for group in groups for one in group] == [one.origin for one in samples]
    for group in groups:
        assert collate(group).computed == computed(group)
        assert len(group) == 1 or computed(group) <= most_tokens
        assert collate(group, shares=False).computed == sum(len(one.token_ids) for one in group)
    fewest, group = 0, list[Sample]()
    for one in samples:
        group = [*group, one]
        if len(group) == 1 or computed(group) > most_tokens:
            fewest, group = fewest + 1, [one]
    assert len(groups) == fewest
    assert split_evenly(samples, most_tokens, shares=True) == groups


def test_a_common_beginning_leaves_room_for_another_sample() -> None:
    prompt, answers = [(7, False)] * 10, [[(8 + n, True)] * 3 for n in range(4)]
    samples = [sample(*prompt, *answer) for answer in answers]
    assert [len(group) for group in split_evenly(samples, 26)] == [2, 2]
    assert [len(group) for group in split_evenly(samples, 26, shares=True)] == [4]  # 9 + 4 * 4 tokens
    assert [len(group) for group in split_evenly(samples, 24, shares=True)] == [2, 2]
    assert [collate(samples, shares=shares).computed for shares in (True, False)] == [25, 52]


# --- The plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 61])
def test_every_epoch_is_another_order_of_all_samples(count: int, split: tuple[int, int, int]) -> None:
    plan = Plan(count, *split, seed=3)
    assert plan.window_size == 8
    assert plan.steps_per_epoch == -(-count // 8)
    epochs = []
    for epoch in range(3):
        windows = [plan.window(epoch * plan.steps_per_epoch + place) for place in range(plan.steps_per_epoch)]
        assert [len(window) for window in windows[:-1]] == [8] * (len(windows) - 1)
        assert len(windows[-1]) == (count % 8 or 8)
        epochs.append(np.concatenate(windows).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    if count > 6:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 11])
def test_samples_per_step_are_shared_among_any_number_of_processes(processes: int) -> None:
    config = TrainConfig(per_device_train_batch_size=4, samples_per_step=10, seed=3)
    plan, one = Plan.of(config, 61, processes), Plan.of(config, 61)
    assert plan.steps_per_epoch == 7
    for step in range(2 * plan.steps_per_epoch):
        shares = [plan.micro_batches(step, process) for process in range(processes)]
        seen = [index for share in shares for batch in share for index in batch.tolist()]
        assert sorted(seen) == sorted(one.window(step).tolist())
        assert all(len(batch) <= min(4, -(-10 // processes)) for share in shares for batch in share)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_a_window_does_not_depend_on_its_split(split: tuple[int, int, int]) -> None:
    batch_size, accumulation, processes = split
    plan, whole = Plan(61, *split, seed=3), Plan(61, 8, 1, 1, seed=3)
    for step in range(2 * plan.steps_per_epoch):
        shares = [plan.micro_batches(step, process) for process in range(processes)]
        seen = [index for share in shares for batch in share for index in batch.tolist()]
        assert sorted(seen) == sorted(whole.window(step).tolist())
        assert all(len(share) <= accumulation for share in shares)
        assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)
        full = len(whole.window(step)) == 8
        assert not full or {len(share) for share in shares} == {accumulation}


def test_a_run_can_go_on_at_any_step() -> None:
    uninterrupted = [Plan(61, 2, 2, 2, seed=3).window(step).tolist() for step in range(30)]
    for step in np.random.default_rng(0).permutation(30).tolist():
        assert Plan(61, 2, 2, 2, seed=3).window(step).tolist() == uninterrupted[step]


def test_the_order_is_the_seeds() -> None:
    orders = {tuple(Plan(61, 61, 1, 1, seed=seed).window(step).tolist()) for seed in range(5) for step in range(2)}
    assert len(orders) == 10
