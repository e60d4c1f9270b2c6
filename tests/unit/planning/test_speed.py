"""What was seen is kept and found again; the nearest run counts, scaled by the work of a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from qingtune.planning.speed import (
    FILE,
    MOST_KEPT,
    PRODUCTS,
    SHARE_OF_PRODUCTS,
    Speed,
    TokenWork,
    estimate_speed,
    flops_per_token,
    keep_speed,
    read_speeds,
)


def seen(method: str = "lora", flops: float = 2e9, rate: float = 200.0, device: str = "a") -> Speed:
    return Speed(device, "16-bit", method, flops, rate)


def test_the_work_of_a_token_is_that_of_the_docs() -> None:
    work = TokenWork(body=357_826_560, head=136_134_656, adapters=35_192_832, attention_width=896, attention_layers=24)
    assert flops_per_token(work, 0.6, 326, full=False) == pytest.approx(2.011e9, rel=1e-3)  # docs/performance.md
    once = flops_per_token(work, 0.6, 326, full=False)
    again = flops_per_token(work, 0.6, 326, full=False, recomputed=1.0)
    assert again - once == pytest.approx(2 * work.body + 24 * 4 * 896 * 326 / 2)
    assert flops_per_token(work, 0.5, 0, full=True) == 6 * (work.body + work.head / 2)


def test_the_nearest_run_of_the_method_counts() -> None:
    speeds = [seen(flops=1e9, rate=400), seen(flops=8e9, rate=60), seen("full", flops=2e9, rate=100)]
    estimate = estimate_speed(speeds, "a", "16-bit", "lora", 4e9 * 1.5)
    assert estimate is not None
    assert estimate.tokens_per_second == pytest.approx(60 * 8 / 6)
    assert "earlier run" in estimate.basis


def test_another_method_or_products_stand_in() -> None:
    other = estimate_speed([seen("full"), seen(PRODUCTS, 1.0, 4e11)], "a", "16-bit", "lora", 2e9)
    assert other is not None
    assert other.tokens_per_second == pytest.approx(200 * SHARE_OF_PRODUCTS["lora"] / SHARE_OF_PRODUCTS["full"])
    assert "another method" in other.basis
    products = estimate_speed([seen(PRODUCTS, 1.0, 4e11)], "a", "16-bit", "lora", 2e9)
    assert products is not None
    assert products.tokens_per_second == pytest.approx(200 * SHARE_OF_PRODUCTS["lora"])


@pytest.mark.parametrize(("device", "dtype"), [("b", "16-bit"), ("a", "fp32")])
def test_other_devices_and_formats_say_nothing(device: str, dtype: str) -> None:
    assert estimate_speed([seen()], device, dtype, "lora", 2e9) is None


def test_a_run_takes_the_place_of_one_of_its_kind(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    for speed in (seen(), seen(flops=2.01e9, rate=250), seen(flops=4e9), seen("full"), seen(device="b")):
        keep_speed(cache, speed)
    assert read_speeds(cache) == [seen(flops=2.01e9, rate=250), seen(flops=4e9), seen("full"), seen(device="b")]
    for number in range(MOST_KEPT + 5):
        keep_speed(cache, seen(device=f"{number}"))
    assert len(read_speeds(cache)) == MOST_KEPT
    assert read_speeds(cache)[-1].device == f"{MOST_KEPT + 4}"


@pytest.mark.parametrize(
    "content", ["", "{", "3", '[{"device": "a"}]', '[{"device":"a","dtype":"","method":"","flops_per_token":0,'
                '"tokens_per_second":1}]', "[1]"],
)  # fmt: skip
def test_a_broken_file_is_no_file(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    assert read_speeds(tmp_path) == []
