"""Quantities as text."""

from __future__ import annotations

import pytest

from qingtune.output.units import counted, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4 s"),
        (9.94, "9.9 s"),
        (61, "61 s"),
        (99.4, "99 s"),
        (125, "2 min"),
        (5_400, "90 min"),
        (9_000, "2.5 h"),
        (5e6, "1,388.9 h"),
    ],
)
def test_a_time_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "form", "text"),
    [
        (0, ",", "0 rows"),
        (1, ",", "1 row"),
        (2_000, ",", "2,000 rows"),
        (1.0004, ".3g", "1 row"),
        (0.5, ".3g", "0.5 rows"),
    ],
)
def test_one_of_something_is_in_the_singular(number: float, form: str, text: str) -> None:
    assert counted(number, "row", form) == text
