"""`make demo` takes as many steps as fit into its time, and shows the answers that the run's report holds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, load_tool, write_jsonl

from qingtune.training import loop

demo: Any = load_tool("demo")


def trial(tokens_per_second: float) -> Any:
    return demo.Trial(startup_s=20.0, step_tokens=600.0, tokens_per_second=tokens_per_second)


def of_tiny_model(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the demo train a tiny model in three steps, into folder/output."""
    rows = write_jsonl(folder / "rows.jsonl", instruction_rows(4))
    settings = {
        "model_name_or_path": str(model), "data_path": str(rows), "eval_data_path": str(rows), "use_lora": True,
        "output_dir": str(folder / "output"), "report_to": "none", "learning_rate": 0.01,
    }  # fmt: skip
    file = folder / "demo.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(demo, "_model", lambda: (str(file), {}))
    monkeypatch.setattr(demo, "_try", lambda *_: None)
    monkeypatch.setattr(demo, "MOST_STEPS", 3)
    monkeypatch.setattr(demo, "MOST_TOKENS", 8)


def test_a_fast_machine_takes_all_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo._length(trial(2000), 400) == (demo.MOST_STEPS, demo.SHOWN)
    assert demo._length(None, 10) == (demo.MOST_STEPS, demo.SHOWN)  # too fast to be measured
    assert "2,000 tokens a second: 66 steps, about" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [120, 150, 180])
def test_the_steps_fit_into_the_time_that_is_left(rate: float) -> None:
    measured, left = trial(rate), 400.0
    steps, shown = demo._length(measured, left)
    assert demo.FEWEST_STEPS <= steps < demo.MOST_STEPS
    assert measured.seconds(steps, shown) <= left - demo.RESERVE_S < measured.seconds(steps + 2, shown)


def test_a_slow_machine_shows_less_and_says_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo._length(trial(20), 400) == (demo.FEWEST_STEPS, 1)
    said = capsys.readouterr().err
    assert "20 tokens a second, which is slow" in said
    assert "25 minutes instead of 8. Ctrl-C saves after the step and stops; make demo resumes it.\n" in said


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_saves_and_the_demo_resumes(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_tiny_model(tiny(), tmp_path, monkeypatch)
    step = loop._step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", lambda *given: (signal.raise_signal(signal.SIGINT), step(*given))[1])
        assert demo.main([]) == 130
    assert "Stopped and saved after step 1. To resume: make demo\n" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_show", lambda _: signal.raise_signal(signal.SIGINT))
        assert demo.main([]) == 130
    said = capsys.readouterr().err
    assert "Resuming from " in said
    assert said.endswith(
        "Interrupted. A fetched model and saved checkpoints are kept; make demo continues with them.\n"
    )


def test_the_terminal_shows_the_answers_of_the_report(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_tiny_model(tiny(), tmp_path, monkeypatch)
    assert demo.main([]) == 0
    first = capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "output" / "eval_samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [0, 0, 3, 3]
    shown = "".join(first.split("│"))
    assert all(line["answer"].split()[0] in shown for line in kept if line["step"] in (0, 3) and line["answer"].split())
    monkeypatch.setattr(demo, "_try", lambda *_: pytest.fail("it was measured again"))
    assert demo.main([]) == 0
    again = capsys.readouterr().out
    assert again == first[first.index(again[:20]) :]


def test_a_run_of_an_earlier_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = demo.load_train_config("configs/demo_smollm2.json", {"output_dir": str(tmp_path)}).config
    monkeypatch.setattr(demo, "_configure", lambda _: config)
    monkeypatch.setattr(demo, "train", lambda *_, **__: True)
    assert demo.main([]) == 2
    assert f"{tmp_path}: this run of an earlier version kept no answers. Rename" in capsys.readouterr().err
