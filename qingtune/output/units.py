"""Quantities as text."""

from __future__ import annotations


def counted(number: float, noun: str, form: str = ",") -> str:
    """How many there are of something, such as 1 row or 2,000 rows.

    Args:
        noun: in the singular; its plural ends in -s.
        form: how the number is written, for `format`.
    """
    text = format(number, form)
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def duration(seconds: float) -> str:
    """A time in the unit that suits it, such as 3.2 s, 94 s, 70 min or 14.0 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:,.1f} h"
