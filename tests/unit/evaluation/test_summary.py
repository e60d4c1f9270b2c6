"""Measured trials -> spread, quality, what cannot be told apart; and the table, JSON and picture of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from qingtune.config.training import TrainConfig
from qingtune.evaluation.compare.setups import Setup
from qingtune.evaluation.compare.summary import Comparison, SetupRow, Spread, compare_outcomes
from qingtune.evaluation.compare.tables import as_console, as_json, as_markdown
from qingtune.evaluation.compare.trial import Numbers, TrialOutcome
from qingtune.runs.plots import plot_comparison

BEFORE = 4.0


def setup(name: str) -> Setup:
    return Setup(name, cast("Any", name.split()[0]), {}, TrainConfig(learning_rate=1e-4))


def finished(loss: float, before: float = BEFORE, **changes: Any) -> TrialOutcome:
    numbers = {"peak_bytes": 2_000_000_000, "trained_parameters": 5, "parameters": 100, "tokens_per_second": 120.0}
    return TrialOutcome(
        "finished", numbers=Numbers(**{**numbers, "seconds": 60.0, **changes}, eval_loss_before=before, eval_loss=loss)
    )


def compared(**losses: Sequence[float] | Sequence[TrialOutcome]) -> Comparison:
    """Each setup's losses or outcomes, for seeds 42, 43, ..."""
    return compare_outcomes(
        [
            (setup(name), {42 + n: x if isinstance(x, TrialOutcome) else finished(x) for n, x in enumerate(of_seeds)})
            for name, of_seeds in losses.items()
        ]
    )


def row(comparison: Comparison, name: str) -> SetupRow:
    return next(row for row in comparison.rows if row.setup.name == name)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_spread_over_seeds() -> None:
    assert row(compared(full=[3.0, 3.4, 3.1]), "full").measured["eval_loss"] == Spread(3.1, 3.0, 3.4)


def test_quality_is_a_share_of_fulls_way() -> None:
    found = compared(lora=[3.25], full=[3.0])
    assert found.reference is not None
    assert found.reference.setup.name == "full"
    assert row(found, "lora").measured["quality"] == Spread(0.75, 0.75, 0.75)
    assert row(found, "full").measured["quality"] == Spread(1, 1, 1)
    assert row(found, "lora").measured["perplexity_ratio"].median == pytest.approx(math.exp(0.25))


def test_what_quantisation_costs_counts_against_a_method() -> None:
    """Its way begins where full training's does, not at its own worse start."""
    found = compared(full=[3.0], qlora4=[finished(3.5, before=4.5)])
    assert row(found, "qlora4").measured["quality"] == Spread(0.5, 0.5, 0.5)


def test_quality_is_taken_seed_by_seed_from_seeds_that_both_have() -> None:
    found = compared(full=[3.0, 2.0, TrialOutcome("failed")], lora=[3.5, 3.0, 1.0])
    assert row(found, "lora").measured["quality"] == Spread(0.5, 0.5, 0.5)


def test_without_full_the_best_is_the_reference() -> None:
    found = compared(lora=[3.4], qlora8=[3.2], qlora4=[3.6])
    assert found.reference is not None
    assert (found.reference, found.reference.setup.name) == (found.best, "qlora8")
    assert row(found, "qlora4").measured["quality"].median == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("best", "gain"),
    [
        ([BEFORE - 0.001], "0.0010"),  # others once had a quality of "-3691.9 %" of it
        ([BEFORE - 0.1, BEFORE - 0.4, BEFORE - 0.35], None),  # the range over seeds, 0.3, is below each gain but one
        ([BEFORE - 0.4, BEFORE - 0.41], ""),
    ],
)
def test_no_quality_where_the_reference_learned_too_little_to_tell(best: list[float], gain: str | None) -> None:
    found = compared(lora=best, qlora4=[BEFORE + 0.037] * len(best))
    page, screen = as_markdown(found, []), as_console(found)
    assert ("quality" not in row(found, "qlora4").measured) is (gain != "")
    assert ("too little to compare others with" in page) is (gain != "")
    assert (gain or "") in page
    assert "-3" not in screen.replace("---", "")
    if gain == "":
        assert "< 0 %" in screen
        assert "< 0 %: worse than before training" in page


def test_no_quality_where_the_reference_learned_nothing() -> None:
    found = compared(full=[4.1], lora=[3.0])
    assert "quality" not in row(found, "lora").measured
    assert "full did not lower eval_loss" in as_markdown(found, [])


@pytest.mark.parametrize(
    ("full", "lora", "alike"),
    [
        ([3.00, 3.10, 3.05], [3.12, 3.13, 3.14], True),  # 0.08 apart, ranges 0.10 and 0.02
        ([3.00, 3.10, 3.05], [3.16, 3.17, 3.18], False),
        ([3.00], [3.0001], None),
        ([3.00, 3.10], [3.05], None),
    ],
)
def test_less_than_the_spread_is_not_told_apart(full: list[float], lora: list[float], alike: bool | None) -> None:
    found = compared(full=full, lora=lora)
    assert row(found, "lora").alike is alike
    assert row(found, "full").alike is None
    assert [other.setup.name for other in found.alike_best] == (["lora"] if alike else [])


def test_nothing_finished() -> None:
    found = compared(full=[TrialOutcome("failed", "no memory")], lora=[TrialOutcome("not run")])
    assert (found.reference, found.best) == (None, None)
    assert "- full, seed 42, failed: no memory" in as_markdown(found, [])


# --- Text ------------------------------------------------------------------------------------------------------------

THREE = {
    "full": [finished(3.0, peak_bytes=9_010_000_000, trained_parameters=100), finished(3.1), finished(3.05)],
    "lora": [3.12, 3.13, 3.14],
    "qlora4": [3.6, 3.7, TrialOutcome("failed", "the disk is full")],
}


def test_markdown_has_medians_and_ranges() -> None:
    page = as_markdown(compared(**THREE), ["Model: tiny"]).splitlines()
    assert page[:3] == ["# Comparison", "", "- Model: tiny"]
    lora = next(line for line in page if line.startswith("| lora |"))
    assert lora.split(" | ")[4:7] == ["60 s", "4.0000", "3.1300 (3.1200 - 3.1400)"]
    assert lora.endswith(" | 90.5 % (88.0 % - 96.7 %) ~ | 1.094 (1.030 - 1.127) |")
    assert "- qlora4, seed 44, failed: the disk is full" in page
    assert "- Fewer seeds are finished of: qlora4." in page
    assert "- Lowest eval_loss: full (3.0500)." in page
    assert "- Within the spread of it: lora. Least memory among them: full (2.00 GB)." in page


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        ({"max_steps": 4}, {"max_steps": 8}, "(max_steps)"),
        ({"num_train_epochs": 1}, {"num_train_epochs": 2}, "(num_train_epochs)"),
        ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 4}, "(per_device_train_batch_size)"),
        ({"max_steps": 4, "num_train_epochs": 1}, {"max_steps": 4, "num_train_epochs": 2}, None),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            None,
        ),
    ],
)
def test_other_samples_are_told(one: dict[str, Any], two: dict[str, Any], told: str | None) -> None:
    both = [Setup(f"lora {config}", "lora", {}, TrainConfig(**config)) for config in (one, two)]
    page = as_markdown(compare_outcomes([(each, {42: finished(3.0)}) for each in both]), [])
    found = [line for line in page.splitlines() if "do not train on the same samples in the same steps" in line]
    assert [told in line for line in found if told] == [True] * bool(told)
    assert len(found) == bool(told)


def test_one_seed_is_said_to_be_one() -> None:
    page = as_markdown(compared(full=[3.0], lora=[3.1]), [])
    assert "One seed (42): small differences may be noise. --seeds 3 shows the spread." in page
    assert "(3.1" not in page


@pytest.mark.parametrize("name", ["full", "lora lora_r=64 learning_rate=0.0001 lora_target_modules=q_proj,v_proj"])
def test_console_table_fits_80_columns_and_keeps_its_numbers(name: str) -> None:
    many = finished(3.123456, peak_bytes=123_450_000_000, seconds=400_000, tokens_per_second=123456.0)
    shown = as_console(compare_outcomes([(setup(name), {42: many, 43: finished(3.2)})]))
    assert max(map(len, shown.splitlines())) <= 80
    assert "3.1617" in shown
    assert "±0.0383" in shown
    lines = shown.splitlines()
    width = lines[3].index(" 62.73 GB")
    column = re.sub(r"\s", "", "".join(line[:width] for line in lines[3:11]))
    assert re.sub(r"\s", "", name) in column


def test_json_holds_every_trial() -> None:
    found = json.loads(json.dumps(as_json(compared(**THREE)), allow_nan=False))
    assert (found["reference"], found["best"], found["not told apart from the best"]) == ("full", "full", ["lora"])
    qlora = found["setups"][2]
    assert qlora["eval_loss"] == {"median": pytest.approx(3.65), "least": 3.6, "most": 3.7}
    assert [trial["state"] for trial in qlora["trials"]] == ["finished", "finished", "failed"]
    assert qlora["trials"][0]["eval_loss"] == 3.6


def test_json_has_no_infinities() -> None:
    found = as_json(compared(full=[finished(900.0, before=901.0)]))
    assert found["setups"][0]["perplexity"] == {"median": None, "least": None, "most": None}
    json.dumps(found, allow_nan=False)


# --- Picture ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # as of a character that no font has
@pytest.mark.parametrize("name", ["lora", "lora 小红书", "lora \U0010fffd"])
def test_picture_is_drawn(name: str, tmp_path: Path) -> None:
    points = [("full", (9.0, 9.0, 9.1), (100.0, 99.0, 101.0)), (name, (2.6, 2.6, 2.6), (96.0, 95.0, 97.0))]
    plot_comparison(points, ("memory (GB)", "quality (%)"), tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    """As in `lora_target_modules=.*q_proj$,.*v_proj$`; the middle would be taken for one that cannot be read."""
    point = ("lora lora_target_modules=.*q_proj$,.*^^v_proj$", (9.0, 9.0, 9.1), (100.0, 99.0, 101.0))
    plot_comparison([point], ("memory (GB)", "quality (%)"), tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()
