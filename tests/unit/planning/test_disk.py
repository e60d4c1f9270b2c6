"""What a run writes is what its plan says, and a disk without room for it is named before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LORA, save_model, train

from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.machine.resources import Machine, supposed_gpu
from qingtune.planning.blueprint import read_blueprint
from qingtune.planning.disk import DiskPlan, free_on_disk, most_checkpoints
from qingtune.planning.planner import Samples
from qingtune.planning.report import Report, as_json, as_lines, make_report, short_lines
from qingtune.training import setup

CPU = Machine("cpu", "a CPU", 4, 24 * 10**9, 25 * 10**9, 30 * 10**9)
EVALUATED = {"eval_strategy": "epoch", "val_size": 0.5}


@pytest.mark.parametrize(
    ("settings", "steps", "epoch", "count"),
    [
        ({"save_strategy": "no"}, 100, 10, 0),
        ({"save_steps": 30}, 100, 10, 4),  # the last step saves as well
        ({"save_steps": 500}, 100, 10, 1),
        ({"save_strategy": "epoch"}, 100, 10, 10),
        ({"save_steps": 30}, None, None, None),
        ({"save_strategy": "epoch"}, 100, None, None),
        ({"save_steps": 10, "save_total_limit": 3}, 100, 10, 4),
        ({"save_steps": 10, "save_total_limit": 3, "val_size": 0.1}, 100, 10, 5),
        ({"save_steps": 50, "save_total_limit": 3}, 100, 10, 2),
        ({"save_steps": 10, "save_total_limit": 1}, None, None, 2),
        ({"save_strategy": "epoch", "load_best_model_at_end": True, **EVALUATED}, 100, 10, 20),
    ],
)
def test_most_checkpoints(settings: dict[str, Any], steps: int | None, epoch: int | None, count: int | None) -> None:
    assert most_checkpoints(TrainConfig.model_validate(settings), steps, epoch) == count


def report_of(folder: Path, machine: Machine = CPU, **settings: Any) -> Report:
    config = TrainConfig.model_validate(settings)
    samples = Samples(64, 64, 1.0, 24, False, "for tests")
    return make_report("m", read_blueprint(folder), config, machine, samples, [])


@pytest.mark.parametrize("method", [LORA, {}])
def test_files_are_as_large_as_planned(method: dict[str, Any], tmp_path: Path, data_file: Path) -> None:
    model, output = save_model(tmp_path / "model"), tmp_path / "output"
    steps = {"max_steps": 3, "save_steps": 1}
    train(output, model, data_file, **method, **steps)
    planned = report_of(model, output_dir=str(output), **method, **steps).own.disk
    written = output / ("adapter_model.safetensors" if method else "model.safetensors")
    folders = list(output.glob("checkpoint-*"))
    assert len(folders) == planned.checkpoints == 3
    tensors = [path.stat().st_size for path in folders[0].glob("*.safetensors")]
    headers = 20_000  # of tiny files
    assert 0 <= written.stat().st_size - planned.result < headers
    assert 0 <= sum(tensors) - planned.checkpoint < headers


def test_a_limit_is_never_exceeded_while_a_run_saves(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, output = list[int](), tmp_path / "output"
    prune: Any = setup.prune

    def counted(*given: Any) -> None:
        seen.append(len(list(output.glob("checkpoint-*"))))
        prune(*given)

    monkeypatch.setattr(setup, "prune", counted)
    limits = {"max_steps": 5, "save_steps": 1, "save_total_limit": 1}
    train(output, save_model(tmp_path / "model"), data_file, **LORA, **limits)
    assert max(seen) == most_checkpoints(TrainConfig.model_validate(limits), 5, 100) == 2


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def text_of(report: Report) -> str:
    assert max(map(len, as_lines(report))) <= 80
    return " ".join(" ".join(as_lines(report)).split())


def test_the_report_says_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    settings = {"output_dir": str(tmp_path / "none" / "yet"), "save_steps": 1, "max_steps": 4}
    disk = report_of(model, **settings).own.disk
    assert disk.total == disk.result + 4 * disk.checkpoint
    for free, fits, line in (
        (disk.total, True, "up to 4 checkpoints of 0.00 GB; 0.00 GB are free."),
        (disk.total - 1, False, "Choose another output_dir, or have save_total_limit remove old checkpoints."),
        (disk.result - 1, False, "that may not fit: 0.00 GB are free. Choose another output_dir."),
    ):
        with_free(monkeypatch, free)
        report = report_of(model, **settings)
        assert line in text_of(report)
        assert any(line in short for short in short_lines(report))
        assert as_json(report)["disk"] == {
            "result_bytes": disk.result, "checkpoint_bytes": disk.checkpoint, "checkpoints": 4, "free_bytes": free,
            "fits": fits,
        }  # fmt: skip


def test_another_machine_has_another_disk(tmp_path: Path) -> None:
    report = report_of(save_model(tmp_path / "model"), supposed_gpu(24), save_strategy="no")
    assert report.own.disk.fits is None
    assert "Disk: the result 0.00 GB. " in text_of(report)


def test_how_many_checkpoints_may_not_be_known() -> None:
    plan = DiskPlan(10, 3, None, 12)
    assert plan.total == 13
    assert plan.fits is False


def test_a_run_says_at_its_start_what_does_not_fit(
    tmp_path: Path, data_file: Path, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model")
    disk = report_of(model, **LORA).own.disk
    settings = LORA | {"max_steps": 2, "save_steps": 1}
    with_free(monkeypatch, disk.result + disk.checkpoint)
    train(tmp_path / "warned", model, data_file, **settings)
    assert any("left; 2 checkpoints of about" in line for line in reported())
    with_free(monkeypatch, disk.result - 1)
    with pytest.raises(UserError, match=r"the disk has .* left, and the result needs about"):
        train(tmp_path / "refused", model, data_file, **settings)


def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert free_on_disk(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
