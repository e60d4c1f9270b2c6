"""Tokens per second are the same wherever a run's speed is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qingtune.commands.train import Result, _summary
from qingtune.config.training import TrainConfig
from qingtune.evaluation.compare.setups import Setup
from qingtune.evaluation.compare.trial import Trial, finished_outcome
from qingtune.export.model_card import _last_line
from qingtune.planning.of_run import measured_speed
from qingtune.runs.measures import tokens_per_second
from qingtune.runs.page.render import _figures
from qingtune.runs.page.source import read_run
from qingtune.runs.record import METRICS, Record, write_record

RESULT = Result(True, 30, 20.0, 10**9, None, 1, 2, 4.0, 3.0, None, None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run whose first logged line is slow: 50 tokens/s over all lines, 150 without the first."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 4.0, "eval_seconds": 1.0}]
    lines += [
        {"step": step, "loss": 2.0, "tokens": 300, "seconds": seconds, "peak_bytes": 5}
        for step, seconds in ((10, 14.0), (20, 1.0), (30, 3.0))
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_record(tmp_path, Record("lora", "base", "", None, "chat", [], {}, vars(RESULT)))
    return tmp_path


def test_everyone_says_the_same(run: Path) -> None:
    config = TrainConfig(use_lora=True, output_dir=str(run))
    numbers = finished_outcome(Trial(Setup("lora", "lora", {}, config), 1, run)).numbers
    assert numbers is not None
    assert numbers.tokens_per_second == measured_speed(run / METRICS) == 150
    assert dict(_figures(read_run(run)))[("tokens/s", "token/秒")] == "150"  # pyright: ignore[reportArgumentType]
    assert _last_line(run)["speed"] == "150 tokens/s"
    assert _summary(config, RESULT).splitlines()[0] == "30 steps in 20 s, 150 tokens/s, peak memory 1.00 GB"


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [
        ([100, 300, 500], [9.0, 1.0, 3.0], 200),
        ([100], [2.0], 50),  # all that there is
        ([100, math.nan, 300], [2.0, 1.0, 1.0], 300),
        ([], [], None),
        ([100], [0.0], None),
    ],
)
def test_the_first_line_is_the_warm_up(tokens: list[float], seconds: list[float], speed: float | None) -> None:
    assert tokens_per_second(tokens, seconds) == speed
