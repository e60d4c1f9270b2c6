"""The list of faults, which the files of trials fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault_harness import Bench


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, what should come of it, and the trial: it returns what was seen or raises Lost."""

    name: str
    expected: str
    trial: Callable[[Bench], str]


FAULTS: list[Fault] = []


def fault(name: str, expected: str) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Enter a trial in the list."""

    def enter(trial: Callable[[Bench], str]) -> Callable[[Bench], str]:
        FAULTS.append(Fault(name, expected, trial))
        return trial

    return enter
