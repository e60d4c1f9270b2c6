"""Charts: ticks that can be read, lines that keep their peaks and gaps, and numbers that are always finite."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from qingtune.runs.page.charts import BOX, COLUMNS, MOST_DOTS, MOST_TICKS, Chart, Column, make_chart, smooth
from qingtune.runs.page.words import Words, both

NAME = Words("loss", "损失")


def chart_of(*columns: tuple[list[int], list[float]], from_zero: bool = False) -> Chart:
    made = [Column("raw", NAME, steps, values) for steps, values in columns]
    chart = make_chart(NAME, both("nats"), made, lambda value: f"{value:.4f}", from_zero=from_zero)
    assert chart is not None
    return chart


def points_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.e+-]+) (-?[\d.e+-]+)", path)]


@pytest.mark.parametrize(
    ("values", "from_zero", "texts"),
    [
        ([1.2, 3.4], False, ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5"]),
        ([0.0, 171.0], True, ["0", "50", "100", "150", "200"]),
        ([0.7, 0.7], False, ["0.60", "0.65", "0.70", "0.75", "0.80"]),
        ([0.0, 0.0], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([-0.3, 0.3], False, ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
        ([1200.0, 5400.0], True, ["0", "2,000", "4,000", "6,000"]),
    ],
)
def test_y_ticks_are_round_and_hold_all_values(values: list[float], from_zero: bool, texts: list[str]) -> None:
    chart = chart_of(([1, 2], values), from_zero=from_zero)
    assert [text for _, text in chart.y_ticks] == texts
    assert [place for place, _ in chart.y_ticks] == pytest.approx(np.linspace(100, 0, len(texts)).tolist())
    assert all(0 <= y <= BOX for _, y in points_of(chart.lines[0].path))
    assert chart.unit == both("nats")


@pytest.mark.parametrize(
    ("values", "unit", "texts"),
    [
        ([0.0, 2e-4], "nats ×10⁻⁴", ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        ([0.0, 3e12], "nats ×10¹²", ["0", "1", "2", "3"]),
    ],
)
def test_powers_of_ten_stand_in_the_unit(values: list[float], unit: str, texts: list[str]) -> None:
    chart = chart_of(([1, 2], values))
    assert (chart.unit.english, [text for _, text in chart.y_ticks]) == (unit, texts)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (1, 240), (0, 100_000), (7, 7), (990, 1010)])
def test_x_ticks_are_whole_steps_within_the_box(first: int, last: int) -> None:
    ticks = chart_of(([first, last], [1.0, 2.0])).x_ticks
    assert 1 <= len(ticks) <= MOST_TICKS + 1
    assert all(0 <= place <= 100 for place, _ in ticks)
    assert all(first <= int(text.replace(",", "")) <= last for _, text in ticks)
    assert len({text for _, text in ticks}) == len(ticks)


def test_a_value_stands_where_the_ticks_say() -> None:
    chart = chart_of(([0, 50, 100], [1.0, 1.75, 2.5]))
    assert points_of(chart.lines[0].path)[1] == (500.0, 500.0)
    assert chart.y_ticks[0] == (100.0, "1.0")
    assert chart.y_ticks[-1] == (0.0, "2.5")


def test_missing_values_are_gaps_and_lonely_points_are_dots() -> None:
    many = list(range(MOST_DOTS * 3))
    values = [1.0 + step % 2 for step in many]
    values[10] = values[12] = values[20] = math.nan  # 11 stands alone
    line = chart_of((many, values)).lines[0]
    assert line.path.count("M") == 4
    assert [x for x, _ in points_of(line.dots)] == pytest.approx([11 / many[-1] * BOX], rel=1e-4)
    assert "nan" not in line.path + line.points


def test_lines_of_few_points_are_dotted() -> None:
    assert len(points_of(chart_of(([0, 8, 16], [3.0, 2.0, 1.0])).lines[0].dots)) == 3


def test_nothing_to_draw_is_no_chart() -> None:
    for column in (Column("raw", NAME, [], []), Column("raw", NAME, [1], [math.nan])):
        assert make_chart(NAME, both(""), [column], str) is None


def test_a_long_run_is_thinned_but_keeps_its_peaks_and_its_gap() -> None:
    steps = list(range(1, 100_001))
    values = [2.0 + math.sin(step) for step in steps]
    values[33_333], values[66_666], values[80_100] = 9.0, -5.0, math.nan
    line = chart_of((steps, values)).lines[0]
    kept, texts = json.loads(line.points)
    assert len(kept) <= 5 * COLUMNS
    assert dict(zip(kept, texts, strict=True)).items() >= {33_334: "9.0000", 66_667: "-5.0000"}.items()
    assert (kept[0], kept[-1]) == (1, 100_000)
    assert line.path.count("M") == 2
    assert max(y for _, y in points_of(line.path)) - min(y for _, y in points_of(line.path)) > 0.9 * BOX


def test_the_average_follows_without_the_pull_of_its_start_and_keeps_gaps() -> None:
    values = [5.0] * 50
    values[7] = math.nan
    smoothed = smooth(values)
    assert smoothed is not None
    averages, window = smoothed
    assert window == 5
    assert [place for place, value in enumerate(averages) if math.isnan(value)] == [7]
    assert [value for value in averages if not math.isnan(value)] == pytest.approx([5.0] * 49)
    assert smooth([1.0] * 19) is None


def test_the_average_is_an_exponential_one() -> None:
    smoothed = smooth([0.0] * 29 + [3.0])
    assert smoothed is not None
    averages, window = smoothed
    share = 2 / (window + 1)
    assert averages[-1] == pytest.approx(3.0 * share / (1 - (1 - share) ** 30))
