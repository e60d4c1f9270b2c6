"""The folder that a run writes to: one run at a time, made and removed again, others' files left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT

from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.files.digests import write_manifest
from qingtune.files.staging import staging_folder
from qingtune.files.write import write_json
from qingtune.runs.folder import (
    LOCK,
    check_output_folder,
    only_run_in,
    prepare_output_folder,
    put_result,
    refuse_inputs,
)
from qingtune.runs.record import Record

HOLD = "import sys; from pathlib import Path; from qingtune.runs.folder import only_run_in\n"
HOLD += "with only_run_in(Path(sys.argv[1])): print('held', flush=True); input()"


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone_even_if_killed(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    other = holder(folder)
    message = rf"another run is writing to this output_dir \(process {other.pid}\)"
    with pytest.raises(UserError, match=message), only_run_in(folder):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with only_run_in(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_into_which_nothing_came_is_removed_with_those_made_around_it(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with only_run_in(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_that_a_killed_run_left_is_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / ".train_config.json.tmp").touch()
    check_output_folder(tmp_path, overwrite=False)
    prepare_output_folder(tmp_path, start_over=False)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="files that do not belong to a training run"):
        check_output_folder(tmp_path, overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made_is_told() -> None:
    with (
        pytest.raises(UserError, match=r"/proc/output: output_dir cannot be written"),
        only_run_in(Path("/proc/output")),
    ):
        pass


def begin(folder: Path, record: dict[str, object] | None = None) -> None:
    """Have a run begun in a folder."""
    folder.mkdir(exist_ok=True)
    config = TrainConfig.model_validate({"output_dir": str(folder), "data_path": ["rows.jsonl"]})
    write_json(folder / "train_config.json", config.model_dump(mode="json"))
    if record:
        write_json(folder / "qingtune.json", {**asdict(Record("lora", "", "", None, "chat", [], {})), **record})


def finish(folder: Path, **files: str) -> None:
    """Put an adapter into a run's folder."""
    with staging_folder(folder / "result") as staged:
        for name, text in ADAPTER.items():
            (staged / name).write_text(files.get(name.partition(".")[0], text))
        put_result(staged, folder)


ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "weights", "tokenizer.json": "{}"}


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
@pytest.mark.parametrize("name", ["metrics.jsonl", "loss_curve.png", "eval_samples.jsonl", "report.html", "trackers"])
def test_links_where_a_run_writes_are_refused_before_it_begins(name: str, tmp_path: Path) -> None:
    (tmp_path / "train_config.json").touch()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="this is a link"):
        check_output_folder(tmp_path, overwrite=True)


def test_files_that_a_run_does_not_write_are_not_removed(tmp_path: Path) -> None:
    mine = ["README.md", "predictions_after.jsonl.mine", "predictions_mine.jsonl", "tokenizer_notes.txt"]
    begin(tmp_path)
    for name in (*mine, "metrics.jsonl"):
        (tmp_path / name).touch()
    prepare_output_folder(tmp_path, start_over=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_files_of_others_among_those_of_trackers_stay(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "trackers" / "qingtune" / "mine").mkdir(parents=True)
    for name in ("events.out.tfevents.1.host.2.0", "mine/notes.txt"):
        (tmp_path / "trackers" / "qingtune" / name).touch()
    prepare_output_folder(tmp_path, start_over=True)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["trackers/qingtune/mine/notes.txt"]
    (tmp_path / left[0]).rename(tmp_path / "trackers" / "events.out.tfevents.1")
    begin(tmp_path)
    prepare_output_folder(tmp_path, start_over=True)
    assert not list(tmp_path.iterdir())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_removed_by_its_list_and_only_as_it_was_written(tmp_path: Path) -> None:
    begin(tmp_path)
    finish(tmp_path)
    (tmp_path / "README.md").touch()
    check_output_folder(tmp_path, overwrite=True)
    (tmp_path / "tokenizer.json").write_text('{"edited": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json \(changed since\)"):
        check_output_folder(tmp_path, overwrite=True)
    prepare_output_folder(tmp_path, start_over=True)
    assert names(tmp_path) == ["README.md", "tokenizer.json"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_model.safetensors"])
def test_a_file_where_the_result_goes_is_refused_by_name(name: str, overwrite: bool, tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"changed or unknown files where this run writes: {name}"):
        check_output_folder(tmp_path, overwrite=overwrite)
    prepare_output_folder(tmp_path, start_over=True)
    assert names(tmp_path) == [name]


def test_a_project_with_a_configuration_of_its_own_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "train_config.json").write_text('{"output_dir": ".", "use_lora": true}')
    with pytest.raises(UserError, match="files that do not belong to a training run"):
        check_output_folder(tmp_path, overwrite=True)


def test_a_result_without_a_list_is_known_by_its_record(tmp_path: Path) -> None:
    begin(tmp_path, {"method": "lora"})
    for name, text in ADAPTER.items():
        (tmp_path / name).write_text(text)
    check_output_folder(tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"config\.json \(not of a result\)"):
        check_output_folder(tmp_path, overwrite=True)
    prepare_output_folder(tmp_path, start_over=True)
    assert names(tmp_path) == ["config.json"]


def test_checkpoints_are_known_by_their_manifests(tmp_path: Path) -> None:
    begin(tmp_path)
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        write_manifest(folder)
    (tmp_path / "checkpoint-1" / "state.json").write_text("broken")
    check_output_folder(tmp_path, overwrite=True)
    (tmp_path / "checkpoint-2" / "notes.txt").touch()
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "pytorch_model.bin").touch()
    theirs = r"checkpoint-2 \(holds notes\.txt\), checkpoint-500 \(without the manifest of a checkpoint\)"
    with pytest.raises(UserError, match=theirs):
        check_output_folder(tmp_path, overwrite=True)
    prepare_output_folder(tmp_path, start_over=True)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-500"]


def test_what_comes_into_the_way_during_a_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path)
    (tmp_path / "tokenizer.json").write_text("mine")
    finish(tmp_path)
    (kept,) = tmp_path.glob("tokenizer.json.replaced-*")
    assert kept.read_text() == "mine"
    assert f"it was renamed to {kept.name}" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_a_result_that_is_replaced_halfway_is_known_by_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path)
    finish(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("qingtune.runs.folder.usual_permissions", _killed)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, adapter_model="longer weights")
    assert (tmp_path / "adapter_model.safetensors").read_text() == "weights"
    check_output_folder(tmp_path, overwrite=False)
    finish(tmp_path, adapter_model="longer weights")
    assert names(tmp_path) == sorted([*ADAPTER, "qingtune_files.json", "train_config.json"])


def _killed(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["predictions_after.jsonl", "checkpoint-2/rows.jsonl", "."])
def test_what_is_read_is_not_replaced(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir would replace the data"):
        refuse_inputs(tmp_path, {"the data": [tmp_path / name]})
    refuse_inputs(tmp_path, {"the data": [tmp_path / "rows.jsonl", tmp_path.parent / name]})


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
def test_what_is_read_is_not_written_to_by_a_hard_link(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "metrics.jsonl").hardlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="output_dir would replace the data"):
        refuse_inputs(tmp_path, {"the data": [tmp_path / "rows.jsonl"]})
