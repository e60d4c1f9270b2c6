"""What kinds of adapters are made of: what a start takes, which layer a pattern means, what is merged."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils.other import get_pattern_key

from qingtune.adapters.names import layer_number, pattern_value
from qingtune.adapters.variants import (
    DRAWN,
    TAKEN,
    LowRank,
    merge_weight,
    row_norms,
    scaling_of,
    take,
)

NAMES = [
    f"model.layers.{n}.{part}" for n in (1, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_up_proj")
]
PATTERNS = [["q_proj"], ["layers.1.mlp.up_proj"], ["up_proj", "mlp.up_proj"], [r"layers\.\d\..*"], ["proj"], [".*proj"]]


def weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def test_scaling() -> None:
    assert scaling_of(16, 8, rank_stabilised=False) == 2
    assert scaling_of(16, 4, rank_stabilised=True) == 8


def test_drawn_starts_have_the_spread_they_are_known_for() -> None:
    found = {name: draw(64, 400, torch.Generator().manual_seed(0)) for name, draw in DRAWN.items()}
    assert float(found["default"].abs().max()) <= 1 / math.sqrt(400)
    assert float(found["default"].std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert float(found["gaussian"].std()) == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16"])
def test_pissa_takes_the_largest_singular_values(start: str, shape: tuple[int, int]) -> None:
    w, r, scaling = weight(*shape), 5, 3.0
    a, b = take(start, w, r, scaling, "layer")
    assert (a.shape, b.shape) == ((r, shape[1]), (shape[0], r))
    values = torch.linalg.svdvals(w)
    rest = torch.linalg.svdvals(w - scaling * b @ a)
    close = {"pissa": 1e-5, "pissa_niter_16": 1e-2}[start]
    torch.testing.assert_close(rest[: min(shape) - r], values[r:], atol=close * float(values[0]), rtol=0)
    torch.testing.assert_close(row_norms(a), row_norms(b.t()), atol=close, rtol=close)  # halved in two


def test_the_fast_start_is_the_same_each_time_and_draws_nothing_from_others() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = (TAKEN["pissa_niter_16"](weight(20, 12), 4, 1.0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_olora_starts_orthonormal(shape: tuple[int, int]) -> None:
    a, b = take("olora", weight(*shape), 5, 2.0, "layer")
    torch.testing.assert_close(b.t() @ b, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(b @ a, b @ b.t() @ weight(*shape), atol=1e-5, rtol=0)  # W's part in these directions


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_mean_what_they_mean_in_peft(pattern: list[str]) -> None:
    values = {key: float(number) for number, key in enumerate(pattern, start=1)}
    for name in NAMES:
        assert pattern_value(values, name, 0.0) == values.get(get_pattern_key(pattern, name), 0.0)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("transformer.h.0.mlp.c_proj", 0),
        ("model.layers.3.mlp.experts.7.up_proj", 3),
        ("lm_head", None),
    ],
)
def test_layers_are_known_by_the_first_number(name: str, number: int | None) -> None:
    assert layer_number(name) == number


@pytest.mark.parametrize("magnitude", [None, torch.linspace(1, 2, 20)])
@pytest.mark.parametrize("start", [None, *TAKEN])
def test_merging_takes_out_adds_and_scales(start: str | None, magnitude: torch.Tensor | None) -> None:
    w, a, b = weight(20, 12), weight(3, 12), weight(20, 3)
    low = LowRank(a, b, 0.5, magnitude, start)
    wanted = w.double() + 0.5 * b.double() @ a.double()
    if start:
        a0, b0 = TAKEN[start](w, 3, 0.5)
        wanted -= 0.5 * b0.double() @ a0.double()
        assert len(low.on_unchanged_base(w).a) == 6
    if magnitude is not None:
        wanted *= (magnitude / wanted.norm(dim=1))[:, None]
        torch.testing.assert_close(row_norms(low.merged(w)), magnitude)
    assert float((low.merged(w) - wanted).abs().max()) < 2e-5
    x = weight(7, 12)
    torch.testing.assert_close(low.product(w, x), (x.double() @ wanted.t()).float(), atol=1e-4, rtol=1e-4)
    assert low.merged(w.to(torch.bfloat16)).dtype == torch.float32
    assert merge_weight(w.to(torch.bfloat16), a, b, 0.5).dtype == torch.float32
