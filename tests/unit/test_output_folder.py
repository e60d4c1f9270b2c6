"""The folder that a run writes to: one run at a time, made and removed again, others' files left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from qingtune.errors import UserError
from qingtune.output_folder import LOCK, check_output_folder, only_run_in, prepare_output_folder

HOLD = "import sys; from pathlib import Path; from qingtune.output_folder import only_run_in\n"
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
    prepare_output_folder(tmp_path, anew=False)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="files that are not of a training run"):
        check_output_folder(tmp_path, overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made_is_told() -> None:
    with (
        pytest.raises(UserError, match=r"/proc/output: output_dir cannot be written"),
        only_run_in(Path("/proc/output")),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
@pytest.mark.parametrize("name", ["metrics.jsonl", "loss_curve.png", "eval_samples.jsonl", "report.html", "trackers"])
def test_links_where_a_run_writes_are_refused_before_it_begins(name: str, tmp_path: Path) -> None:
    (tmp_path / "train_config.json").touch()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="this is a link"):
        check_output_folder(tmp_path, overwrite=True)


def test_files_that_a_run_does_not_write_are_not_removed(tmp_path: Path) -> None:
    mine = ["README.md", "predictions_mine.jsonl", "tokenizer_notes.txt"]
    for name in (*mine, "metrics.jsonl"):
        (tmp_path / name).touch()
    prepare_output_folder(tmp_path, anew=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)
