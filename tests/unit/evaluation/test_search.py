"""A search by Optuna: what it asks, when it stops a trial, and that it goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qingtune.config.commands import CompareConfig
from qingtune.config.types import Interval
from qingtune.errors import UserError
from qingtune.evaluation.compare.search import AskedPoint, Search, extremes

SPACE = {"learning_rate": "1e-5..1e-3:log", "lora_r": [8, 16, 64], "seq": "1..9"}


def search(journal: Path, **settings: Any) -> Search:
    return Search(CompareConfig.model_validate({"use_lora": True, "space": SPACE, "trials": 4, **settings}), journal)


def asked(found: Search) -> AskedPoint:
    point = found.ask()
    assert point is not None
    return point


def test_points_lie_in_the_space(tmp_path: Path) -> None:
    found = search(tmp_path / "journal", sampler="random")
    for number in range(1, 5):
        point = asked(found)
        assert (point.number, point.method) == (number, "lora")
        rate = point.varied["learning_rate"]
        assert 1e-5 <= rate <= 1e-3
        assert rate == float(f"{rate:.3g}")
        assert point.varied["lora_r"] in (8, 16, 64)
        assert point.varied["seq"] in range(1, 10)
        found.tell(point, "finished", [1.0])
    assert found.ask() is None


def test_several_methods_are_searched_together(tmp_path: Path) -> None:
    found = search(tmp_path / "journal", methods="lora,qlora8", trials=12, sampler="random")
    methods = set()
    while point := found.ask():
        methods.add(point.method)
        found.tell(point, "finished", [1.0])
    assert methods == {"lora", "qlora8"}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_interrupted_search_asks_what_it_would_have_asked(tmp_path: Path, sampler: str) -> None:
    def run(journal: Path, reopen_every: int | None) -> list[dict[str, Any]]:
        found, points = search(journal, sampler=sampler, trials=14), []
        while point := found.ask():
            if reopen_every and point.number % reopen_every == 0:  # killed while this one ran
                found = search(journal, sampler=sampler, trials=14)
                again = asked(found)
                assert (again.number, again.varied) == (point.number, point.varied)
                point = again
            points.append(point.varied)
            found.tell(point, "finished", [abs(math.log(point.varied["learning_rate"] / 1e-4))])
        return points

    whole = run(tmp_path / "whole", None)
    assert len({str(point) for point in whole}) > 10
    assert run(tmp_path / "pieces", 3) == whole


def test_what_was_told_is_known_again(tmp_path: Path) -> None:
    found = search(tmp_path / "journal")
    for state in ("finished", "pruned"):
        found.tell(asked(found), state, [2.0] if state == "finished" else [])
    asked(found)
    again = search(tmp_path / "journal")
    assert [state for _, _, state in again.reported()] == ["finished", "pruned"]
    assert asked(again).number == 3


def test_what_failed_is_asked_again_by_the_next_start(tmp_path: Path) -> None:
    found = search(tmp_path / "journal")
    points: list[AskedPoint] = []
    for _ in range(2):
        points.append(asked(found))
        found.tell(points[-1], "failed", [])
    assert [state for _, _, state in found.reported()] == ["failed", "failed"]
    for _ in range(2):  # a start that ends before it asks changes nothing
        again = search(tmp_path / "journal")
        assert not again.reported()
    for number, point in enumerate(points, 1):
        repeated = asked(again)
        assert (repeated.number, repeated.varied) == (number, point.varied)
        again.tell(repeated, "finished", [2.0])
    last = search(tmp_path / "journal")
    assert [varied for _, varied, _ in last.reported()] == [point.varied for point in points]
    assert asked(last).varied not in [point.varied for point in points]


def test_halving_stops_the_worse_half(tmp_path: Path) -> None:
    found = search(tmp_path / "journal", pruner="halving")
    good = asked(found)
    assert not found.falls_behind(good, [3.0, 2.5, 2.2, 2.0], 0)
    found.tell(good, "finished", [2.0])
    bad = asked(found)
    assert found.falls_behind(bad, [3.5], 0)
    found.tell(bad, "pruned", [])
    late = asked(found)
    assert not found.falls_behind(late, [2.9], 0)
    assert found.falls_behind(late, [2.9, 2.6], 1)


def test_nothing_is_stopped_unasked(tmp_path: Path) -> None:
    found = search(tmp_path / "journal")
    found.tell(asked(found), "finished", [1.0])
    assert not found.falls_behind(asked(found), [9.0, 9.5, math.nan], 0)


def test_extremes_hold_every_alternative_and_both_ends() -> None:
    points = extremes({"a": ["x", "y", "z"], "b": Interval(low=8, high=64, whole=True), "c": Interval(low=0, high=0.1)})
    assert [[point[name] for point in points] for name in "abc"] == [["x", "y", "z"], [8, 64, 64], [0.0, 0.1, 0.1]]


def test_without_optuna_there_is_a_way_on(tmp_path: Path) -> None:
    with mock.patch.dict("sys.modules", {"optuna": None}), pytest.raises(UserError, match=r"pip install .*grid"):
        search(tmp_path / "journal")
