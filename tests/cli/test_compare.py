"""qingtune compare as users type it: trials in processes of their own, a report, and going on with what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, instruction_rows, write_jsonl
from test_commands import assert_refused

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(tmp_path: Path, tiny: Callable[..., Path], data_file: Path) -> Path:
    """A comparison of a tiny model, in fp32 on the CPU."""
    evaluation = write_jsonl(tmp_path / "eval.jsonl", instruction_rows(30)[20:])
    values = {
        "model_name_or_path": str(tiny()), "data_path": str(data_file), "eval_data_path": str(evaluation),
        "output_dir": str(tmp_path / "compared"), "use_lora": True, "lora_r": 4, "learning_rate": 0.01, "max_steps": 4,
        "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_methods_are_trained_compared_and_not_trained_again(config: Path, tmp_path: Path, run: Run) -> None:
    command = ("-m", "qingtune", "compare", "--config_file", config, "--methods", "full,lora")
    # An impossible setting for one method: the other is trained all the same.
    ended = run(*command, "--per_method", "full.report_to=zzz", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 1, ended.stderr
    assert 'full, seed 42, failed: report_to: "zzz" is not a tracker' in ended.stdout.replace("\n", " ")
    assert "One seed (42)" in ended.stdout

    began = (tmp_path / "compared" / "trials" / "lora-seed42" / "qingtune.json").stat().st_mtime_ns
    again = run(*command, CUDA_VISIBLE_DEVICES="")
    assert again.returncode == 0, again.stderr
    assert "[2/2] lora, seed 42: finished already" in again.stderr
    assert (tmp_path / "compared" / "trials" / "lora-seed42" / "qingtune.json").stat().st_mtime_ns == began
    assert max(map(len, again.stdout.splitlines()[:8])) <= 80

    found = json.loads((tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8"))
    full, lora = found["setups"]
    assert (found["reference"], full["trained_share"]["median"], full["quality"]["median"]) == ("full", 1.0, 1.0)
    assert 0 < lora["trained_share"]["median"] < 0.5
    assert full["eval_loss_before"] == lora["eval_loss_before"]
    assert lora["eval_loss"]["median"] < lora["eval_loss_before"]["median"]
    assert min(lora["tokens_per_second"]["median"], lora["seconds"]["median"], lora["peak_bytes"]["median"]) > 0
    assert "| full | " in (tmp_path / "compared" / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "compared" / "comparison.png").exists()
    assert not list((tmp_path / "compared" / "trials").glob("*/checkpoint-*"))
    # Its settings run by themselves, and are found to be done.
    alone = run("fine_tune_qwen.py", "--config_file", tmp_path / "compared" / "trials" / "lora-seed42.json")
    assert "This run is finished already" in alone.stderr

    _other_settings_and_other_data_are_refused(config, tmp_path, run)


def _other_settings_and_other_data_are_refused(config: Path, tmp_path: Path, run: Run) -> None:
    command = ("-m", "qingtune", "compare", "--config_file", config, "--methods", "full,lora")
    ended = run(*command, "--max_steps", "5")
    assert ended.returncode == 2
    assert "lora-seed42: max_steps was 4, is 5" in ended.stderr
    write_jsonl(tmp_path / "eval.jsonl", instruction_rows(31)[20:])
    ended = run(*command)
    assert ended.returncode == 2
    assert "the data of this comparison changed since it began" in ended.stderr


def test_ctrl_c_lets_the_trial_save_and_the_same_command_goes_on(config: Path, tmp_path: Path, run: Run) -> None:
    argv = [sys.executable, "-m", "qingtune", "compare", "--config_file", str(config)]
    argv += ["--methods", "lora", "--max_steps", "200", "--save_strategy", "no"]
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    trial = tmp_path / "compared" / "trials" / "lora-seed42"
    deadline = time.monotonic() + 120
    while not (trial / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "lora, seed 42: stopped" in told
    assert f"To go on: qingtune compare --config_file {config}" in told
    assert "Stopped and saved after step" in trial.with_name("lora-seed42.log").read_text(encoding="utf-8")

    again = run(*argv[1:], CUDA_VISIBLE_DEVICES="")
    assert again.returncode == 0, again.stderr
    assert "Going on from" in trial.with_name("lora-seed42.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 201)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "a comparison needs evaluation data"),
        (("--val_size", "2", "--eval_strategy", "no"), 'eval_strategy is "no"'),
        (("--val_size", "2", "--pruner", "halving"), "pruner halving without space"),
        (("--val_size", "2", "--grid", "lora_rr=8"), 'Did you mean "lora_r"?'),
        (("--val_size", "2", "--space", "lora_r=0..8"), 'lora lora_r=0: "lora_r" is 0'),
        (("--val_size", "2", "--resume_from_checkpoint", "x"), "resume_from_checkpoint has no meaning"),
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
    assert_refused(empty, ("compare", "--config_file", config), "output_dir holds files that are not of a comparison")
    assert [path.name for path in output.iterdir()] == ["train_config.json"]
