"""Checkpoints are whole or passed over: broken ones, ways that were left, full disks, old ones going."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, assert_equal, metrics, save_model, train, weights

from qingtune.errors import UserError
from qingtune.files.digests import why_not_whole, write_manifest
from qingtune.files.write import write_json
from qingtune.training import checkpoint
from qingtune.training.checkpoint import checkpoints

STEPS = 6
COMMON: dict[str, Any] = LORA | {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "val_size": 4, "eval_strategy": "steps", "eval_steps": 2,
    "save_steps": 1, "lora_dropout": 0.3, "warmup_steps": 2,
}  # fmt: skip
Runs = Callable[..., bool]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and rows to train it on."""
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_jsonl(folder / "rows.jsonl", instruction_rows(18))


@pytest.fixture
def start(inputs: tuple[Path, Path], tmp_path: Path) -> Runs:
    """A function that starts a run in a folder of this name."""

    def start_run(name: str, **settings: Any) -> bool:
        return train(tmp_path / name, *inputs, **COMMON | settings)

    return start_run


@pytest.fixture(scope="module")
def finished(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that came to its end, and nothing else."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder / "run", *inputs, **COMMON)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which `start("run")` takes up."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def unfinished(folder: Path, step: int) -> Path:
    """Make a finished run one that was killed after a step: the last checkpoints and the result never came."""
    for number, one in checkpoints(folder).items():
        if number > step:
            shutil.rmtree(one)
    (folder / "latest_checkpoint.json").write_text(json.dumps({"folder": f"checkpoint-{step}"}))
    (folder / "qingtune.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    return folder / f"checkpoint-{step}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl"])
@pytest.mark.parametrize("harm", [cut, flip_a_bit, Path.unlink])
def test_a_broken_checkpoint_is_passed_over_with_a_warning(
    name: str, harm: Callable[[Path], None], start: Runs, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = weights(run), metrics(run)
    newest = unfinished(run, 4)
    harm(newest / name)
    capsys.readouterr()
    assert start("run")
    told = capsys.readouterr().err
    assert f"Warning: checkpoint skipped. {newest}: not a complete checkpoint: {name} " in told
    assert f"Resuming from {newest.with_name('checkpoint-3')}." in told
    assert_equal(weights(run), whole[0])
    assert metrics(run) == whole[1]


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"files": 7}', '{"files": {"weights.safetensors": {}}}'])
def test_a_checkpoint_without_a_manifest_is_none(manifest: str | None, start: Runs, run: Path) -> None:
    newest = unfinished(run, 4)
    if manifest is None:
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"not a complete checkpoint: manifest\.json"):
        start("run", resume_from_checkpoint=str(newest))


def test_where_no_checkpoint_is_whole_nothing_starts_from_zero(start: Runs, run: Path) -> None:
    unfinished(run, 2)
    for one in checkpoints(run).values():
        cut(one / "weights.safetensors")
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(UserError, match="none of the 2 checkpoints is complete, so the run cannot resume"):
        start("run")
    assert sorted(run.parent.rglob("*")) == before
    assert start("run", overwrite_output_dir=True)


def test_a_way_that_was_left_is_not_gone_on(start: Runs, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told to go on from step 2, killed after step 3: the next start goes on from 3, though 4 and 5 lie about."""
    unfinished(run, 3)
    for step in (4, 5):
        shutil.copytree(run / "checkpoint-2", run / f"checkpoint-{step}")
    assert start("run", save_total_limit=1)
    assert "Resuming from " + str(run / "checkpoint-3") in capsys.readouterr().err
    assert [*checkpoints(run)] == [STEPS]
    assert all(why_not_whole(one) is None for one in checkpoints(run).values())


def test_without_the_pointer_the_steps_decide_not_the_clock(
    start: Runs, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished(run, 4)
    (run / "latest_checkpoint.json").unlink()
    for step, one in checkpoints(run).items():
        os.utime(one, (10**9 - step, 10**9 - step))
    assert start("run")
    assert f"Resuming from {run / 'checkpoint-4'}." in capsys.readouterr().err


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file, calls = checkpoint.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if 3 <= len(calls) <= 4:  # one file a call: both of step 2's, or its second and step 3's first
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert start("run")
    told = capsys.readouterr().err
    assert "Warning: " + str(tmp_path / "run") + ": checkpoint-2 could not be written: No space left on device." in told
    assert "checkpoint-3 could not be written" in told
    assert [*checkpoints(tmp_path / "run")] == [1, 4, 5, 6]
    assert not list((tmp_path / "run").glob(".*"))


def test_steps_between_two_logged_lines_are_not_lost_by_a_stop(start: Runs, tmp_path: Path) -> None:
    start("whole", logging_steps=4, save_steps=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    unfinished(tmp_path / "stopped", 3)
    assert start("stopped", logging_steps=4, save_steps=3)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_what_a_killed_run_left_half_done_is_removed(start: Runs, run: Path) -> None:
    unfinished(run, 3)
    for name in (".checkpoint-4-ab12cd34", ".result-x1y2z3_4", f".result-{'a1' * 8}.unfinished"):
        (run / name).mkdir()
        (run / name / "weights.safetensors").write_bytes(b"half")
    for name in (".train_config.json.tmp", f".qingtune-{'b2' * 8}.tmp"):
        (run / name).write_text("half")
    assert start("run")
    assert not list(run.glob(".*"))


def test_other_versions_are_told(start: Runs, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = unfinished(run, 3)
    state = json.loads((newest / "state.json").read_text())
    state["versions"]["torch"] = "1.0"
    write_json(newest / "state.json", state)
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    assert start("run")
    assert 'numbers may differ slightly from now on: torch was "1.0", is ' in capsys.readouterr().err
