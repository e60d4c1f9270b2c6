"""Masks are the seed's, drop the share asked for, and keep the expectation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.kernels.dropout import dropout, keep_mask, new_seed

CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    probability=st.floats(0, 0.99),
    seed=st.integers(0, 2**62),
)
def test_the_same_seed_gives_the_same_mask_of_any_shape(shape: tuple[int, ...], probability: float, seed: int) -> None:
    mask, factor = keep_mask(shape, probability, seed, CPU)
    again, _ = keep_mask(shape, probability, seed, CPU)
    assert (mask.shape, mask.dtype) == (shape, torch.bool)
    assert mask.equal(again)
    assert factor == pytest.approx(1 / (1 - probability), rel=2e-3)


@pytest.mark.parametrize("numel", [4097, 4098, 4099])
def test_the_last_elements_of_an_odd_number_are_drawn_too(numel: int) -> None:
    masks = torch.stack([keep_mask((numel,), 0.5, seed, CPU)[0] for seed in range(64)])
    shares = masks.float().mean(0)
    assert shares.min() > 0.1
    assert shares.max() < 0.9


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.05, 0.5, 0.9])
def test_the_share_dropped_is_the_probability_at_every_place_of_a_word(probability: float) -> None:
    count = 400_000
    mask, factor = keep_mask((count // 4, 4), probability, 7, CPU)
    deviation = (probability * (1 - probability) / (count // 4)) ** 0.5
    shares = 1 - mask.double().mean(0)
    assert (shares - probability).abs().max() <= 5 * deviation + 2**-17
    assert mask.double().mean() * factor == pytest.approx(1, abs=5 * deviation / (1 - probability) + 1e-9)
    together = (~mask[:, :1] & ~mask[:, 1:]).double().mean(0)  # neighbours are dropped independently
    assert (together - probability**2).abs().max() <= 5 * probability / (count // 4) ** 0.5 + 2**-16


def test_other_seeds_give_other_masks_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    masks = [keep_mask((1000,), 0.5, seed, CPU)[0] for seed in (1, 2, 9, 2**62 - 1)]
    assert torch.get_rng_state().equal(state)
    for place, one in enumerate(masks):
        assert all(350 < int((one ^ other).sum()) < 650 for other in masks[place + 1 :])
    assert new_seed() != new_seed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_in_the_gradient_what_it_dropped_in_the_value(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(30, 11, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    torch.manual_seed(3)
    mask, factor = keep_mask(x.shape, 0.25, new_seed(), CPU)
    assert x.grad is not None
    assert y.equal(mask.to(dtype) * factor)
    assert x.grad.equal(y)
    assert dropout(x, 0.0).equal(x)


def test_a_probability_just_below_one_gives_a_finite_factor() -> None:
    _, factor = keep_mask((8,), 1 - 1e-6, 0, CPU)
    assert factor <= 2**16
