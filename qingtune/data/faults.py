"""Refused rows as messages: the first of them, each kind of data once for each file, and how many for each reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from qingtune.data.read import Fault, Places
from qingtune.errors import UserError, shorten
from qingtune.output.units import counted

SHOWN_FAULTS = 10
MANY = 0.1  # the share of refused rows that is worth a warning
MOST_REASONS = 20  # listed separately in the count of refused rows


def faulty_rows(faults: Sequence[Fault], rows: int, fix: str = "Fix the rows or pass --on_bad_row skip.") -> UserError:
    """The error that lists the first faults, a kind of data once for each file, and says what can be done."""
    fields = ' --ignore_fields skips fields, for example "label".' * any(fault.kind for fault in faults)
    lines = "\n".join(fault_lines(faults))
    return UserError(f"{lines}\n({len(faults):,} of {counted(rows, 'row')}.) {fix}{fields}")


def fault_lines(faults: Sequence[Fault]) -> list[str]:
    """The first faults, a line each; those of one kind of data share a line for each file."""
    kinds: dict[tuple[str, str], Places] = {}
    for fault in faults:
        if fault.kind:
            kinds.setdefault((fault.origin.rpartition(":")[0], fault.kind), Places()).add(str(fault))
    single = [str(fault) for fault in faults if not fault.kind]
    lines = [
        places.first[0] + (f" (and {counted(places.count - 1, 'more row')})" if places.count > 1 else "")
        for places in kinds.values()
    ]
    more = len(single) - SHOWN_FAULTS
    return [*lines, *single[:SHOWN_FAULTS], *[f"... and {more:,} more"] * (more > 0)]


def describe_rows(name: str, rows: Mapping[str, int], reasons: Mapping[str, int]) -> list[str]:
    """How many rows went which way, as a sum, and the reasons why rows were refused; a warning where these are many."""
    lines = [f"{name}: {sum_of_rows(rows)}"]
    every, refused = sum(rows.values()), rows.get("refused", 0)
    if reasons:
        warning = "Warning: " * (refused >= MANY * every)
        why = "; ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        share = f"{refused:,} of {counted(every, 'row')} ({refused / every:.0%})"
        lines.append(f"{warning}{name}: {share} refused: {why}")
    return lines


def sum_of_rows(rows: Mapping[str, int]) -> str:
    """All rows as the sum of those that went each way, such as `300 rows = 143 used + 157 refused`."""
    parts = " + ".join(f"{count:,} {what}" for what, count in rows.items() if count or what == "used")
    return f"{counted(sum(rows.values()), 'row')} = {parts}"


def count_reasons(faults: Sequence[Fault]) -> dict[str, int]:
    """How many rows were refused for each reason, most first; what differs from row to row is left out of a reason."""
    counts: Counter[str] = Counter()
    for fault in faults:
        add_reason(counts, fault)
    return dict(counts.most_common())


def add_reason(counts: dict[str, int], fault: Fault) -> None:
    """Count a refused row under its reason."""
    reason = fault.kind or shorten(re.sub(r"\d[\d,.]*", "N", fault.reason))
    reason = reason if reason in counts or len(counts) < MOST_REASONS else "other reasons"
    counts[reason] = counts.get(reason, 0) + 1
