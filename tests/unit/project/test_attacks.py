"""The attack suite: its judge finds each kind of fault, and a sample of its cases ends well."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_tool


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "attacks"))


def place_in(folder: Path) -> Any:
    harness, case = importlib.import_module("attack_harness"), importlib.import_module("attack_case")
    good = case.Case("judge", "good", case.nothing, ((),), needs=())
    return harness.make_place(good, folder, folder / "case")


def wrong_with(
    folder: Path, code: int = 0, *, out: bytes = b"", err: bytes = b"", act: Callable[[Any], object] = id, **more: Any
) -> str:
    """What the judge says of a command that ended like this, after `act` was done to the case's folder."""
    cases, judge = importlib.import_module("attack_case"), importlib.import_module("attack_judge")
    of_end = {name: more.pop(name) for name in ("cpu_s", "why_killed", "reached", "ids") if name in more}
    case = cases.Case("judge", "case", cases.nothing, (("infer",),), **{"expect": "either", "needs": (), **more})
    place = place_in(folder)
    before = judge.snapshot(place.folder)
    act(place)
    ended = cases.Ended(("infer",), code, out, err, **of_end)
    return "; ".join(judge.judge(case, place, before, [ended]).wrong)


def test_what_is_well_is_not_bad(tmp_path: Path) -> None:
    assert not wrong_with(tmp_path / "a", out=b"an answer\n", expect="fine")
    assert not wrong_with(tmp_path / "b", 2, err=b"error: model/config.json: broken\n", names=("config.json",))
    assert not wrong_with(tmp_path / "c", act=lambda place: place.write("out/result", "x"))
    assert not wrong_with(tmp_path / "d", -9, codes=(0, -9))


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        ({"code": 1}, "exit code 1"),
        ({"err": b"Traceback (most recent call last):\n  x\nKeyError: 5\n"}, "traceback: KeyError: 5"),
        ({"code": -11}, "signal 11"),
        ({"code": -9, "codes": (0, 130)}, "exit code -9"),
        ({"why_killed": "time"}, "hung"),
        ({"cpu_s": 99.0}, "99 s of computing"),
        ({"out": b"x\n" * 300}, "300 lines"),
        ({"expect": "refused"}, "accepted"),
        ({"code": 2, "err": b"error: a reason\n", "expect": "fine"}, "refused what is legitimate"),
        ({"code": 2, "err": b"error: a reason\n", "names": ("config.json",)}, "does not say where"),
        ({"code": 2}, "without a word"),
        ({"out": b"\x1b]52;c;eA==\x07", "tty": True}, "escape"),
        ({"reached": ("network: hub",)}, "reached network"),
        ({"out": b"zq7-planted-zq7-4f1c9b"}, "a secret is shown"),
        ({"check": lambda place, ended: "another result"}, "another result"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, faults: dict[str, Any], word: str) -> None:
    assert word in wrong_with(tmp_path, faults.pop("code", 0), **faults)


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda place: place.pwned.touch(), "a stranger's code ran"),
        (lambda place: (place.outside / "precious.txt").write_text("evil"), "changed outside/precious.txt"),
        (lambda place: (place.outside / "precious.txt").unlink(), "removed outside/precious.txt"),
        (lambda place: (place.home / ".profile").touch(), "made home/.profile"),
        (lambda place: place.write("elsewhere", "x"), "made work/elsewhere"),
        (lambda place: place.write("out/result", "zq7-planted-zq7-4f1c9b"), "a secret is in result"),
        (lambda place: (place / "link").symlink_to("/etc"), "made work/link"),
    ],
)
def test_what_was_touched_is_found(tmp_path: Path, act: Callable[[Any], object], word: str) -> None:
    assert word in wrong_with(tmp_path, act=act)


def test_a_modelfile_is_read_as_ollama_reads_it() -> None:
    generation = importlib.import_module("attack_generation")
    text = 'FROM ./a.gguf\n# FROM b\nTEMPLATE """x\nFROM c\n"""\nPARAMETER stop "<e>"\nFROM d\n'
    words = [word for word, _ in generation.instructions(text)]
    assert words == ["FROM", "TEMPLATE", "PARAMETER stop", "FROM"]
    quotes = [('"', '"""'), ('a "b"', '"""'), ("x", '"'), ('x"\nFROM e', '"')]
    assert [generation.instructions(f"SYSTEM {quote}{text}{quote}\n")[0][1] for text, quote in quotes] == [
        '"', 'a "b"', "x", "x",
    ]  # fmt: skip


def test_cases_are_many_with_names_of_their_own_and_the_same_each_time() -> None:
    listing = importlib.import_module("attack_list")
    cases = listing.all_cases(1)
    assert len(cases) >= 1000
    assert len({case.identity for case in cases}) == len(cases)
    assert [case.seed for case in cases] == [case.seed for case in listing.all_cases(1)]
    assert {case.group for case in cases} == set(listing.GROUPS)
    for group in listing.GROUPS:
        assert any(case.expect == "fine" for case in cases if case.group == group), group


# Classes with commands that need neither weights nor an earlier run, so that a few cases of each cost little.
CHEAP = ("data", "settings")
LIGHT = ("check", "plan")


@pytest.mark.skipif(sys.platform != "linux", reason="the suite forks, and waits by pidfd")
def test_a_sample_of_the_suite_ends_well(tmp_path: Path) -> None:
    listing, attacks = importlib.import_module("attack_list"), load_tool("attacks/__main__")
    draw = random.Random(7)
    chosen: list[Any] = []
    for group in CHEAP:
        cases = [
            case
            for case in listing.all_cases(1)
            if case.group == group
            and case.commands[0][0] in LIGHT
            and not case.env
            and not any(word in case.name for word in ("costly", "fifo"))  # a minute each if they hang
        ]
        chosen += draw.sample(cases, 5)
    results = attacks.try_all(chosen, ROOT, tmp_path, 1)
    assert [f"{result.case.identity}: {result.verdict.wrong}" for result in results if result.verdict.bad] == []
