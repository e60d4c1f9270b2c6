"""qingtune compare as users type it: trials in processes of their own, a report, and going on with what is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULES, ROOT, instruction_rows, write_jsonl
from test_commands import assert_refused, call

STEPS = 60


@pytest.fixture
def config(tmp_path: Path, tiny: Callable[..., Path], data_file: Path) -> Path:
    """A comparison of a tiny model, in fp32 on the CPU."""
    evaluation = write_jsonl(tmp_path / "eval.jsonl", instruction_rows(30)[20:])
    values = {
        "model_name_or_path": str(tiny()), "data_path": str(data_file), "eval_data_path": str(evaluation),
        "output_dir": str(tmp_path / "compared"), "use_lora": True, "lora_r": 4, "learning_rate": 0.01,
        "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_steps": STEPS,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_interrupted_comparison_goes_on_and_is_reported(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the trials, which are processes
    monkeypatch.setenv("PYTHONPATH", MODULES)
    argv = ["-m", "qingtune", "compare", "--config_file", str(config), "--methods", "lora"]
    told, code = _interrupt_its_first_trial(argv, tmp_path / "compared" / "trials" / "lora-seed42")
    assert code == 130, told
    assert "[1/1] lora, seed 42: stopped" in told
    assert f"Stopped. To resume: {sys.executable} -m qingtune compare --config_file {config} --methods lora" in told

    code, shown, told = call(*argv[2:])
    assert code == 0, told
    assert "One seed (42)" in shown
    assert re.match(r"Evaluated on \d+ samples?\. With so few, small differences may be noise\.\n", shown)
    assert max(map(len, shown.splitlines()[:8])) <= 80
    log = (tmp_path / "compared" / "trials" / "lora-seed42.log").read_text(encoding="utf-8")
    assert "Stopped and saved after step" in log
    assert "Resuming from" in log
    _report_is_right(tmp_path / "compared")
    _nothing_is_trained_again(argv[2:], tmp_path)


def _interrupt_its_first_trial(argv: list[str], trial: Path) -> tuple[str, int]:
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while '"loss"' not in _text(trial / "metrics.jsonl") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told, _ = process.communicate(timeout=300)
    return told, process.returncode


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _report_is_right(folder: Path) -> None:
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    [lora] = found["setups"]
    assert (found["reference"], found["best"], lora["quality"]["median"]) == ("lora", "lora", 1.0)
    assert 0 < lora["trained_share"]["median"] < 0.5
    assert lora["eval_loss"]["median"] < lora["eval_loss_before"]["median"]
    assert min(lora[name]["median"] for name in ("tokens_per_second", "seconds", "peak_bytes")) > 0
    assert "| lora | " in (folder / "comparison.md").read_text(encoding="utf-8")
    assert (folder / "comparison.png").exists()
    assert not list((folder / "trials").glob("*/checkpoint-*"))
    lines = [
        json.loads(line) for line in (folder / "trials" / "lora-seed42" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]


def _nothing_is_trained_again(argv: list[str], tmp_path: Path) -> None:
    record = tmp_path / "compared" / "trials" / "lora-seed42" / "qingtune.json"
    began = record.stat().st_mtime_ns
    code, _, told = call(*argv)
    assert (code, "[1/1] lora, seed 42: already finished" in told) == (0, True), told
    assert record.stat().st_mtime_ns == began

    code, _, told = call(*argv, "--max_steps", "5")
    assert (code, f"lora-seed42: max_steps was {STEPS}, is 5" in told) == (2, True)
    write_jsonl(tmp_path / "eval.jsonl", instruction_rows(31)[20:])
    code, _, told = call(*argv)
    assert (code, "the data of this comparison changed since it began" in told) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "a comparison needs evaluation data"),
        (("--val_size", "2", "--eval_strategy", "no"), 'eval_strategy is "no"'),
        (("--val_size", "2", "--pruner", "halving"), "pruner halving needs space"),
        (("--val_size", "2", "--trials", "3"), "trials needs space"),
        (("--val_size", "2", "--dry_run"), "dry_run does not apply to a comparison"),
        (("--val_size", "2", "--grid", "lora_rr=8"), 'Did you mean "lora_r"?'),
        (("--val_size", "2", "--space", "lora_r=0..8"), 'lora lora_r=0: "lora_r" is 0'),
        (("--val_size", "2", "--resume_from_checkpoint", "x"), "resume_from_checkpoint does not apply"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_file: Path, flags: tuple[str, ...], message: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert_refused(empty, ("compare", "--data_path", data_file, "--use_lora", *flags), message)


def test_a_training_runs_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    values: dict[str, Any] = json.loads(config.read_text())
    output = Path(values["output_dir"])
    output.mkdir()
    (output / "train_config.json").write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert_refused(
        empty, ("compare", "--config_file", config), "output_dir contains files that do not belong to a comparison"
    )
    assert [path.name for path in output.iterdir()] == ["train_config.json"]
