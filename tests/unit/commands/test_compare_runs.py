"""Comparisons whose trials are run by a stand-in for training: order, seeds, searches, and going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_jsonl

from qingtune.commands.compare import compare
from qingtune.config.commands import CompareConfig
from qingtune.config.load import load_config
from qingtune.errors import UserError
from qingtune.evaluation.compare import trial as trials
from qingtune.evaluation.compare.trial import Trial

# The loss falls with the steps and is the lower, the nearer the learning rate is to 1e-4; seeds differ a little.
TRAIN = """
import json, math, os, pathlib, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(130))
config = json.loads(pathlib.Path(sys.argv[1]).read_text())
output = pathlib.Path(config["output_dir"])
output.mkdir(parents=True, exist_ok=True)
settings = ["model_name_or_path", "dry_run", "resume_from_checkpoint", "overwrite_output_dir"]
(output / "train_config.json").write_text(json.dumps({**dict.fromkeys(settings), **config}))
with (output.parent.parent / "order").open("a") as order:
    order.write(output.name + "\\n")
if config.get("lora_r") == 13:
    sys.exit("unlucky")
if os.environ.get("PRESS_CTRL_C") == "soon":
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if os.environ.get("PRESS_CTRL_C") == "late":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.kill(os.getppid(), signal.SIGINT)
loss = 2 + abs(math.log10(config["learning_rate"] / 1e-4)) + config["seed"] / 1000
lines = [{"step": 0, "epoch": 0, "eval_loss": 5.0, "eval_seconds": 0.1}]
for step in (1, 2):
    lines.append({"step": step, "epoch": 0.1, "loss": 1, "tokens": 10, "seconds": 1, "peak_bytes": 9})
    lines.append({"step": step, "epoch": 0.1, "eval_loss": loss + 2 - step, "eval_seconds": 0.1})
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    time.sleep(float(sys.argv[2]))
results = {"peak_bytes": 9, "trained_parameters": 5, "parameters": 100, "eval_loss": loss, "steps": 2}
if not config.get("use_lora"):
    (output / "model.safetensors").write_text("large")
record = dict(method="", base_model="", base_fingerprint="", system_prompt=None, prompt_style="chat", stop_ids=[])
(output / "qingtune.json").write_text(json.dumps({**record, "settings": {}, "results": results}))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any], list[str]]]:
    """A function that compares LoRA settings; returns the exit code, the numbers, and the trials in their order."""
    data = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    monkeypatch.setattr(trials, "SECONDS_BETWEEN_LOOKS", 0.02)

    def compare_settings(seconds: float = 0, **settings: Any) -> tuple[int, dict[str, Any], list[str]]:
        def command(trial: Trial) -> list[str]:
            return [sys.executable, "-S", "-c", TRAIN, str(trial.config_file), str(seconds)]

        monkeypatch.setattr(trials, "training_command", command)
        values = {"use_lora": True, "data_path": str(data), "eval_data_path": str(data), "max_steps": 4, **settings}
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "lora_alpha": 16, **values}))
        code = compare(load_config(CompareConfig, str(file), {}), "again")
        order = (tmp_path / "out" / "order").read_text().splitlines()
        return code, json.loads((tmp_path / "out" / "comparison.json").read_text()), order

    return compare_settings


def test_seeds_come_in_turns_and_more_can_be_added(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"learning_rate": [1e-4, 2e-4]}
    _, _, order = run(grid=grid, seeds=2)
    one, two = "lora_learning_rate=0.0001", "lora_learning_rate=0.0002"
    assert order == [f"{one}-seed42", f"{two}-seed42", f"{one}-seed43", f"{two}-seed43"]
    code, found, order = run(grid=grid, seeds=3)
    assert (code, order[4:]) == (0, [f"{one}-seed44", f"{two}-seed44"])
    assert found["best"] == "lora learning_rate=0.0001"
    assert found["setups"][0]["eval_loss"] == {"median": 2.043, "least": 2.042, "most": 2.044}
    assert "trials/lora_learning_rate=0.0001-seed42.json" in capsys.readouterr().out


def test_of_whole_models_only_the_best_stays(run: Callable[..., Any], tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-3, 1e-4, 1e-5]}

    def models() -> list[str]:
        return sorted(path.parent.name for path in (tmp_path / "out" / "trials").glob("*/model.safetensors"))

    run(use_lora=False, lora_alpha=None, grid=grid, seeds=2, keep_models="all")
    assert len(models()) == 6
    run(use_lora=False, lora_alpha=None, grid=grid, seeds=2)  # nothing is trained, but room is made
    assert models() == ["full_learning_rate=0.0001-seed42"]
    removed = tmp_path / "out" / "trials" / "full_learning_rate=0.001-seed42"
    note = (removed / "weights_removed.txt").read_text()
    assert f"qingtune train --config_file {removed}.json --overwrite_output_dir" in note
    _, found, order = run(use_lora=False, lora_alpha=None, grid=grid, seeds=2)
    assert (len(order), found["best"]) == (6, "full learning_rate=0.0001")


def test_failed_trial_is_told_and_the_others_go_on(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, found, order = run(grid={"lora_r": [13, 8]}, learning_rate=1e-4)
    assert (code, len(order)) == (1, 2)
    assert [setup["trials"][0]["state"] for setup in found["setups"]] == ["failed", "finished"]
    assert "lora lora_r=13, seed 42, failed: exit code 1: unlucky" in capsys.readouterr().out
    code, _, order = run(grid={"lora_r": [13, 8]}, learning_rate=1e-4)
    assert (code, order[2:]) == (1, ["lora_lora_r=13-seed42"])  # tried again, the other not


def test_failed_points_of_a_search_are_tried_again(run: Callable[..., Any]) -> None:
    space = {"lora_r": [13]}
    code, found, order = run(space=space, trials=1, learning_rate=1e-4)
    assert (code, len(order), found["best"]) == (1, 1, None)
    code, _, order = run(space=space, trials=1, learning_rate=1e-4)
    assert (code, len(order)) == (1, 2)


def test_a_trial_left_behind_is_waited_for(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "trials" / "lora_learning_rate=0.0001-seed42"
    process = _left_behind(folder, seconds=0.6)
    code, _, order = run(grid={"learning_rate": [1e-4]}, overwrite_output_dir=True)
    assert (code, order, process.wait()) == (0, [folder.name], 0)
    assert f"{folder} is still being trained by process {process.pid} of an earlier start" in capsys.readouterr().err


def test_waiting_for_a_trial_left_behind_can_be_stopped(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "trials" / "lora_learning_rate=0.0001-seed42"
    process = _left_behind(folder, seconds=60)
    (tmp_path / "out" / "comparison.json").write_text("{}")
    (folder.parent.parent / "order").touch()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert run(grid={"learning_rate": [1e-4]}, overwrite_output_dir=True) == (130, {}, [])  # nothing was removed
    assert capsys.readouterr().err.endswith("Stopped. To resume: again\n")
    assert process.poll() is None
    process.kill()
    process.wait()


def _left_behind(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that has the folder of a trial; it fails if another trial begins meanwhile."""
    folder.mkdir(parents=True)
    (folder.parent.parent / "compare_config.json").write_text("{}")
    folder.with_name(f"{folder.name}.json").write_text(json.dumps({"output_dir": str(folder)}))
    hold = f"""
import sys, time; from pathlib import Path; from qingtune.runs.folder import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True); time.sleep({seconds}); assert not (Path(sys.argv[1]).parent.parent / "order").exists()
"""
    process = subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_trials_that_cannot_be_removed_are_told(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(grid={"learning_rate": [1e-4]})

    def refuse(path: Path, *_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"trials: cannot be removed \(Permission denied\)"):
        run(grid={"learning_rate": [1e-4]}, overwrite_output_dir=True)


def test_the_report_says_whether_all_train_on_the_same(run: Callable[..., Any]) -> None:
    _, found, _ = run(grid={"learning_rate": [1e-4, 2e-4]})
    assert found["about"][2] == "2 steps of 8 samples, the same for all setups, in the same order"
    _, found, _ = run(grid={"max_steps": [4, 8]}, learning_rate=1e-4)
    assert len(found["about"]) == 2


def test_search_stops_what_falls_behind_and_goes_on(run: Callable[..., Any]) -> None:
    space = {"learning_rate": "1e-5..1e-3:log"}
    code, found, order = run(0.3, space=space, sampler="random", pruner="halving", trials=4)
    assert (code, len(order)) == (0, 4)
    ends = {setup["name"]: setup["trials"][0]["state"] for setup in found["setups"]}
    assert {*ends.values()} == {"finished", "pruned"}
    assert ends[found["best"]] == "finished"
    stopped = next(setup for setup in found["setups"] if ends[setup["name"]] == "pruned")
    assert stopped["trials"][0]["message"].startswith("step 1: eval_loss ")

    code, more, order = run(0.3, space=space, sampler="random", pruner="halving", trials=5)
    assert (code, len(order)) == (0, 5)
    assert [setup["name"] for setup in more["setups"]][:4] == [*ends]
    assert {name: end for name, end in ends.items() if end == "pruned"}.items() <= {
        setup["name"]: setup["trials"][0]["state"] for setup in more["setups"]
    }.items()


@pytest.mark.parametrize(("when", "ends"), [("soon", ["stopped"]), ("late", ["finished", "not run"])])
def test_interrupted_search_goes_on_with_the_same_point(
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    ends: list[str],
) -> None:
    search = {"space": {"learning_rate": "1e-5..1e-3:log"}, "seeds": 2}
    run(**search, trials=1)
    monkeypatch.setenv("PRESS_CTRL_C", when)
    code, found, _ = run(**search, trials=2)
    assert code == 130
    assert [trial["state"] for trial in found["setups"][1]["trials"]] == ends
    assert capsys.readouterr().err.endswith("Stopped. To resume: again\n")
    monkeypatch.delenv("PRESS_CTRL_C")
    code, found, order = run(**search, trials=2)
    assert code == 0
    assert [len(setup["trials"]) for setup in found["setups"]] == [2, 2]
    assert len({*order}) == 4  # the same points
    assert len(order) == (5 if when == "soon" else 4)


def test_another_space_is_another_search(run: Callable[..., Any]) -> None:
    run(space={"learning_rate": [1e-4]}, trials=1)
    with pytest.raises(UserError, match="the space of this comparison changed"):
        run(space={"learning_rate": [2e-4]}, trials=1)
    _, found, _ = run(space={"learning_rate": [2e-4]}, trials=1, overwrite_output_dir=True)
    assert [setup["name"] for setup in found["setups"]] == ["lora learning_rate=0.0002"]


def test_trials_that_are_not_all_ours_stay(run: Callable[..., Any], tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-4]}
    run(grid=grid)
    trials_of = tmp_path / "out" / "trials"
    trial = trials_of / "lora_learning_rate=0.0001-seed42"
    for mine in (trials_of / "thesis.json", trials_of / "notes.log", trial / "notes.txt", trial / "checkpoint-2"):
        if mine.suffix:
            mine.write_text("mine")
        else:
            mine.mkdir()
        before = sorted(trials_of.rglob("*"))
        with pytest.raises(UserError, match=mine.name):
            run(grid=grid, overwrite_output_dir=True)
        assert sorted(trials_of.rglob("*")) == before
        mine.unlink() if mine.suffix else mine.rmdir()
    code, _, order = run(grid=grid, overwrite_output_dir=True)
    assert (code, len(order)) == (0, 2)


def test_links_in_the_place_of_the_report_are_refused_before_the_first_trial(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    grid, out = {"learning_rate": [1e-4]}, tmp_path / "out"
    run(grid=grid)
    shutil.rmtree(out / "trials")
    (out / "comparison.md").unlink()
    (out / "comparison.md").symlink_to(tmp_path / "mine.md")
    with pytest.raises(UserError, match=r"comparison\.md"):
        run(grid=grid)
    assert not (tmp_path / "mine.md").exists()
    assert not (out / "trials").exists()
