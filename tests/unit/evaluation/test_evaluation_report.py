"""The table fits a terminal, says what is sure, and JSON holds no word that JSON does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qingtune.evaluation.metrics import Outcome
from qingtune.evaluation.report import About, Side, as_json, as_markdown, changes_of, notes, print_report, write_report

REFERENCES = ["fresh bread at seven", "closed on mondays", "the blue door is open", "tea and cake"]
ABOUT = About({"rows.jsonl": "abc"}, 4, 4, {"limit": None})
HARNESS = {"arc_easy": {"acc": {"value": 0.25, "error": 0.0125}, "em (strict)": {"value": 1.0, "error": None}}}


def side(loss: float, answers: list[str], **more: Any) -> Side:
    outcomes = [
        Outcome(loss * 5, 5, answer, True, reference, {"max_characters": len(answer) < 20})
        for answer, reference in zip(answers, REFERENCES, strict=True)
    ]
    return Side("base", {"bits": None}, outcomes, more.get("without_loss", []), more.get("harness"))


BOTH = {"before": side(123.4, ["bread " * 9] * 4, harness=HARNESS), "after": side(1.2, REFERENCES, harness=HARNESS)}


@pytest.mark.parametrize("sides", [BOTH, {"after": BOTH["after"]}])
def test_the_table_fits_a_terminal(sides: dict[str, Side], capsys: pytest.CaptureFixture[str]) -> None:
    changes = changes_of(sides)
    print_report(ABOUT, changes, sides)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert len({line.split("  ")[0] for line in shown}) == len(shown)
    assert ("3.91e+53" in str(shown)) == ("before" in sides)
    sure = next(line for line in shown if line.startswith("ROUGE-L"))
    assert ("*" in sure) == ("before" in sides)
    assert "100.00" in sure
    assert any(line.startswith("arc_easy acc") and "0.0125" in line for line in shown)


def test_differences_have_signs() -> None:
    rows = {
        line.split("|")[1].strip(): line
        for line in as_markdown(ABOUT, changes_of(BOTH), BOTH).splitlines()
        if "|" in line
    }
    assert (
        "| 123.4000 [123.4000, 123.4000] | 1.2000 [1.2000, 1.2000] | -122.2000 [-122.2000, -122.2000] \\* |"
        in rows["loss"]
    )
    assert "| +100.0 [+100.0, +100.0] \\* |" in rows["exact match %"]
    assert rows["distinct-1"] == "| distinct-1 | 0.028 | 1.000 | +0.972 |"


def test_json_knows_no_nan(tmp_path: Path) -> None:
    sides = {"before": side(2.0, ["!"] * 4), "after": side(1.0, ["?"] * 4)}
    write_report(tmp_path, ABOUT, sides)
    text = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert found["metrics"]["distinct-1"]["after"] == {"value": None, "interval": None}
    assert found["metrics"]["loss"]["difference"] == {"value": -1.0, "interval": [-1.0, -1.0]}
    assert found["metrics"]["loss"]["difference_excludes_zero"] is True
    assert "- " in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


def test_losses_by_other_tokens_are_told_apart() -> None:
    other = Side("other", {}, [Outcome(9.0, 7, a, True, a) for a in REFERENCES], [], None)
    sides = {"before": other, "after": BOTH["after"]}
    changes = {change.name: change for change in changes_of(sides)}
    assert changes["loss"].difference is None
    assert changes["loss"].before is not None
    assert changes["chrF"].difference is not None
    assert any("cannot be compared" in note for note in notes(ABOUT, list(changes.values()), sides))


def test_rows_without_a_loss_are_named() -> None:
    origins = [f"rows.jsonl:{number}" for number in range(7)]
    sides = {"after": side(1.0, REFERENCES, without_loss=origins)}
    (line,) = [note for note in notes(ABOUT, changes_of(sides), sides) if "too long" in note]
    assert line.startswith("after: 7 rows too long for a loss")
    assert line.endswith("rows.jsonl:4 ...")
    assert as_json(ABOUT, changes_of(sides), sides)["rows_without_loss"] == {"after": origins}
