"""A result replaces only what is known to be an earlier one, as it was written; nothing else is ever removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULES, ROOT

from qingtune.errors import UserError
from qingtune.runs import result_folder
from qingtune.runs.result_folder import RESULT_FILES, ResultFolder, open_result_folder

posix = pytest.mark.skipif(sys.platform == "win32", reason="links and locks of POSIX")


def look(place: Path, *, overwrite: bool = True, maker: str = "merge") -> ResultFolder:
    return open_result_folder(place, maker, "a merged model", overwrite=overwrite)


def put(place: Path, content: str = "new", while_it_is_made: Callable[[], Any] = lambda: None) -> None:
    """Make a result of two files."""
    result = look(place)
    with result.staging() as staged:
        (staged / "config.json").write_text(content)
        (staged / "templates").mkdir()
        (staged / "templates" / "tool.jinja").write_text(content)
        while_it_is_made()
        result.put(staged)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder but lists."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RESULT_FILES
    }


NEW = {"config.json": "new", "templates/tool.jinja": "new"}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """An earlier result, in a folder with nothing else."""
    put(tmp_path / "all" / "merged", "old")
    return tmp_path / "all" / "merged"


def test_a_result_is_replaced_where_that_is_asked_for(merged: Path) -> None:
    with pytest.raises(UserError, match=r"already contains a merged model. Pass --overwrite_output_dir"):
        look(merged, overwrite=False)
    put(merged)
    assert contents(merged.parent) == {f"merged/{name}": text for name, text in NEW.items()}
    assert os.stat(merged).st_mode & 0o700 == 0o700
    (merged / "config.json").unlink()  # what is gone is no harm
    put(merged)
    assert contents(merged) == NEW


@pytest.mark.parametrize("name", ["x" * 256, "a\0b"])
def test_what_no_folder_can_be_called_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir is not a path \((File name too long|embedded null byte)\)"):
        look(tmp_path / name)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_project_is_no_result(overwrite: bool, tmp_path: Path) -> None:
    """Any folder with a config.json once counted as a model, and the message advised the flag that removed it."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / ".git").mkdir()
    for name in ("config.json", "src/main.py", ".git/HEAD"):
        (project / name).write_text("years of work")
    before = contents(project)
    with pytest.raises(
        UserError, match=r"output_dir contains files \(\.git/HEAD, config\.json, src/main\.py\)"
    ) as error:
        look(project, overwrite=overwrite)
    assert "overwrite" not in str(error.value)
    assert contents(project) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 7, "made_by": "x"}', '{"files": {}}', "[" * 100000])
def test_a_broken_list_is_none(content: str, merged: Path) -> None:
    (merged / RESULT_FILES).write_text(content)
    with pytest.raises(UserError, match="no list of what qingtune wrote"):
        look(merged)


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def add_in_subfolder(folder: Path) -> None:
    (folder / "templates" / "mine.jinja").write_text("mine")


def change(folder: Path) -> None:
    (folder / "config.json").write_text("o1d")


def link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder.parent / "elsewhere").write_text("old")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere")


def link_a_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


@posix
@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (add_file, r"notes\.txt \(not of it\)"),
        (add_in_subfolder, r"templates/mine\.jinja \(not of it\)"),
        (change, r"config\.json \(changed since\)"),
        (link, r"config\.json \(no longer a file\)"),
        (link_a_folder, r"more \(not of it\)"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(harm: Callable[[Path], None], named: str, merged: Path) -> None:
    harm(merged)
    before = contents(merged.parent)
    with pytest.raises(UserError, match=named) as error:
        look(merged)
    assert "--overwrite" not in str(error.value)
    assert contents(merged.parent) == before


def test_a_list_cannot_name_files_elsewhere(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    content = json.loads((merged / RESULT_FILES).read_text())
    content["files"] |= {"../../thesis.txt": {"bytes": 13, "sha256": "0"}, str(tmp_path / "thesis.txt"): 7}
    (merged / RESULT_FILES).write_text(json.dumps(content))
    put(merged)
    assert (tmp_path / "thesis.txt").exists()


def test_the_result_of_another_command_is_not_replaced(merged: Path) -> None:
    with pytest.raises(UserError, match="of another command, qingtune merge"):
        look(merged, maker="export")


@posix
@pytest.mark.parametrize(
    ("harm", "mine"),
    [
        (add_file, {"notes.txt": "mine"}),
        (change, {"config.json": "o1d"}),
        (add_in_subfolder, {"templates/mine.jinja": "mine"}),
    ],
)
def test_what_came_in_while_the_result_was_made_stays(
    harm: Callable[[Path], None], mine: dict[str, str], merged: Path
) -> None:
    with pytest.raises(UserError, match=r"changed while the result was made: .*the result is in .*/merged-2"):
        put(merged, "new", lambda: harm(merged))
    assert contents(merged) == {"config.json": "old", "templates/tool.jinja": "old"} | mine
    assert contents(merged.with_name("merged-2")) == NEW
    assert sorted(path.name for path in merged.parent.iterdir()) == ["merged", "merged-2"]


def test_what_came_into_an_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="changed while the result was made"):
        put(tmp_path / "out", "new", lambda: add_file(tmp_path / "out"))
    assert contents(tmp_path / "out") == {"notes.txt": "mine"}


@posix
def test_what_came_in_between_the_last_look_and_the_switch_stays(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    move = result_folder.move_into_place

    def moved(folder: Path, target: Path) -> None:
        (aside,) = merged.parent.glob("merged.replaced-*")
        add_file(aside)
        move(folder, target)

    monkeypatch.setattr(result_folder, "move_into_place", moved)
    put(merged)
    assert contents(merged) == NEW
    (aside,) = merged.parent.glob("merged.replaced-*")
    assert contents(aside) == {"notes.txt": "mine"}
    assert f"{aside} contains files that appeared in output_dir" in capsys.readouterr().err


@posix
def test_links_are_resolved_before_the_work_begins(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for content in ("old", "new"):
        put(tmp_path / "out", content)
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "disk") == NEW


@posix
@pytest.mark.parametrize("place", [".", "..", "../../a/b", "link"])
def test_the_current_folder_is_refused_before_the_work_begins(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    if place == "link":
        Path("../../link").symlink_to(tmp_path / "a" / "b")
        place = str(tmp_path / "link")
    with pytest.raises(UserError, match=r"the current folder or a parent of it\. Choose a folder in it"):
        look(Path(place))


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux's /proc")
def test_a_mounted_disk_and_a_place_that_cannot_be_written_are_refused_before_the_work_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir is a mount point\. Choose a folder in it"):
        look(Path("/proc"))
    with pytest.raises(UserError, match=r"/proc: .* written"), look(Path("/proc/out")).staging():
        pass
    (tmp_path / "note").write_text("x")
    for place in (tmp_path / "note", tmp_path / "note" / "out"):
        with pytest.raises(UserError, match="output_dir"):
            look(place)


@posix
def test_inputs_are_no_place_for_a_result_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "base")
    base = tmp_path / "models" / "base"
    for place, read in [
        (base, base),
        (base.parent, base),
        (tmp_path / "link", base),
        (base, tmp_path / "link"),
        (base / ".." / "base", base),
        (base.parent, tmp_path / "link"),
    ]:
        with pytest.raises(UserError, match="output_dir contains the base model"):
            ResultFolder(place, place.resolve(), "merge", {}).refuse_input("the base model", read)
    look(base / "merged").refuse_input("the base model", base)


# --- Killed ----------------------------------------------------------------------------------------------------------

SWITCH = """
import os, signal, sys
from pathlib import Path
from qingtune.runs import result_folder
sys.path.insert(0, sys.argv[3])
import test_result_folder as tests

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "staged":
    result_folder.list_files = kill
elif sys.argv[2] == "aside":
    result_folder.move_into_place = kill
else:
    result_folder._remove_files = kill
tests.put(Path(sys.argv[1]))
"""


@posix
@pytest.mark.parametrize(("when", "there"), [("staged", "old"), ("aside", "old"), ("moved", "new")])
def test_killed_anywhere_the_next_start_finds_a_whole_result(when: str, there: str, merged: Path) -> None:
    command = [sys.executable, "-c", SWITCH, str(merged), when, str(Path(__file__).parent)]
    paths = os.pathsep.join((str(ROOT / "tests"), MODULES))
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert ended.returncode == -signal.SIGKILL
    look(merged)
    assert contents(merged) == {"config.json": there, "templates/tool.jinja": there}
    put(merged)
    assert contents(merged.parent) == {f"merged/{name}": text for name, text in NEW.items()}
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


@posix
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_broken_off_in_the_switch_the_old_result_is_back(
    error: BaseException, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = result_folder.move_into_place
    calls: list[Path] = []

    def breaks_off(folder: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 1:
            raise error
        move(folder, target)

    monkeypatch.setattr(result_folder, "move_into_place", breaks_off)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        put(merged)
    assert contents(merged) == {"config.json": "old", "templates/tool.jinja": "old"}
    kept = ["merged"] if isinstance(error, KeyboardInterrupt) else ["merged", "merged-2"]
    assert sorted(path.name for path in merged.parent.iterdir()) == kept


def test_ctrl_c_says_that_nothing_was_written_only_where_that_is_so(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^Interrupted: nothing was written\.$"):
        put(merged, while_it_is_made=interrupted)
    assert contents(merged) == {"config.json": "old", "templates/tool.jinja": "old"}
    monkeypatch.setattr(result_folder, "_remove_files", lambda *_: interrupted())
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        put(merged)
    assert contents(merged) == NEW


def test_one_process_at_a_time(merged: Path) -> None:
    with look(merged).staging(), pytest.raises(UserError, match="another process is writing"):
        look(merged)
