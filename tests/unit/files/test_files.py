"""Files are written whole or not at all, and never through what others laid out; one module does it."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qingtune.errors import UserError
from qingtune.files import write as files
from qingtune.files.paths import default_cache, refuse_same_file
from qingtune.files.staging import move_into_place, staging_folder
from qingtune.files.write import copy_file, disk_errors, open_in_place, write_bytes, write_json, write_text

posix = pytest.mark.skipif(sys.platform == "win32", reason="links and locks of POSIX")
THEIRS = "import os"


def write(path: Path) -> None:
    write_text(path, "ours")


def copy(path: Path) -> None:
    source = path.with_name("source")
    source.write_text("ours")
    try:
        copy_file(source, path)
    finally:
        source.unlink()


def append(path: Path) -> None:
    with open_in_place(path, append=True) as file:
        file.write(b"ours")


WAYS = [write, copy, append]


def test_what_is_written_takes_its_place_in_one_move(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one")
    write_text(tmp_path / "a", "two\n")
    assert (tmp_path / "a").read_bytes() == b"two\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@posix
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_link_is_not_written_through(way: Callable[[Path], None], there: bool, tmp_path: Path) -> None:
    outside = tmp_path / "outside.pth"
    if there:
        outside.write_text(THEIRS)
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").symlink_to(outside)
    with pytest.raises(UserError, match=r"report\.html: this is a link \(to .*outside\.pth\)"):
        way(run / "report.html")
    assert outside.exists() == there
    assert not there or outside.read_text() == THEIRS
    assert [path.name for path in run.iterdir()] == ["report.html"]


@posix
@pytest.mark.parametrize("name", [".report.html.tmp", ".report.html", "report.html.tmp"])
def test_names_that_were_predictable_are_not_written_to(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.pth"
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside)
    write(run / "report.html")
    copy(run / "metrics.jsonl")
    assert not outside.exists()


@posix
def test_a_link_laid_out_in_the_last_moment_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files._Folder, "refuse_link", lambda self, path: None)
    outside = tmp_path / "outside"
    outside.write_text(THEIRS)
    (tmp_path / "a").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        append(tmp_path / "a")
    write(tmp_path / "a")  # takes the link's place
    assert outside.read_text() == THEIRS


@posix
def test_another_name_of_the_same_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text(THEIRS)
    os.link(tmp_path / "outside", tmp_path / "a")
    write(tmp_path / "a")
    assert (tmp_path / "outside").read_text() == THEIRS


@posix
@pytest.mark.parametrize("way", WAYS)
def test_pipes_and_folders_are_refused(way: Callable[[Path], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        way(tmp_path / "pipe")
    with pytest.raises(UserError, match="this is a folder"):
        way(tmp_path / "folder")


@posix
def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    write(tmp_path / "run" / "a")
    assert (tmp_path / "disk" / "a").read_text() == "ours"


def test_where_folders_cannot_be_opened_paths_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BY_FOLDER", False)
    write(tmp_path / "a")
    append(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "oursours"


@pytest.mark.parametrize("way", [write, copy])
def test_a_full_disk_leaves_what_was_there(
    way: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("before")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space") as error:
        way(tmp_path / "a")
    assert error.value.filename == str(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


@posix
def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    """As `ulimit -f` sets; Python turns the signal that comes with it into an error."""
    import resource

    from conftest import make_model, make_tokenizer
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in make_model("llama").state_dict().items()}
    ways: dict[str, Callable[[Path], Any]] = {
        "json": lambda folder: write_json(folder / "a.json", "a" * 4096),
        "weights": lambda folder: save_file(tensors, folder / "model.safetensors"),
        "tokenizer": lambda folder: make_tokenizer().save_pretrained(folder),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(name: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        try:
            with disk_errors(name, tmp_path, "Make room."), staging_folder(tmp_path / "result") as folder:
                ways[name](folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    for name in ways:
        with pytest.raises(UserError, match=rf"{name} could not be written: .*File too large.*\. Make room\."):
            limited(name)
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf8_can_be_written_down(tmp_path: Path) -> None:
    import json

    write_json(tmp_path / "a.json", {"data": "b\udcff.jsonl"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"data": "b\udcff.jsonl"}


def test_without_a_home_the_cache_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("QINGTUNE_CACHE", "")
    with pytest.raises(UserError, match=r"HOME is not set.*QINGTUNE_CACHE"):
        default_cache()


@posix
def test_what_is_read_is_not_written_to_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    os.link(tmp_path / "rows", tmp_path / "other")
    for name in ("rows", "link", "other", "../" + tmp_path.name + "/rows"):
        with pytest.raises(UserError, match="output_file would replace the prompt file"):
            refuse_same_file(tmp_path / name, "output_file", {"the prompt file": [tmp_path / "rows"]})
    refuse_same_file(tmp_path / "new", "output_file", {"the prompt file": [tmp_path / "rows"]})


# --- Staging folders -------------------------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from qingtune.files.staging import staging_folder\n"
HOLD += "with staging_folder(Path(sys.argv[1])): print('held', flush=True); input()"


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that stages something next to a path."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@posix
def test_what_a_killed_process_staged_goes_and_what_a_living_one_stages_stays(tmp_path: Path) -> None:
    for name in (".out-mine", ".out-0123456789abcdef.unfinished.bak", ".other-0123456789abcdef.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out-fedcba9876543210.unfinished").symlink_to(tmp_path / ".out-mine")
    kept = {path.name for path in tmp_path.iterdir()}
    other = holder(tmp_path / "out")
    with staging_folder(tmp_path / "out"):
        assert len(list(tmp_path.iterdir())) == len(kept) + 2
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    other.kill()
    other.wait()
    with staging_folder(tmp_path / "out") as mine:
        assert {path.name for path in tmp_path.iterdir()} == {*kept, mine.name}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_long_name_leaves_room_for_what_staging_adds(tmp_path: Path) -> None:
    with staging_folder(tmp_path / ("店" * 80)) as folder:
        move_into_place(folder, tmp_path / ("店" * 80))
    assert [path.name for path in tmp_path.iterdir()] == ["店" * 80]


# --- Who writes ------------------------------------------------------------------------------------------------------

# Calls that write by themselves, and those that make what is written: (file, call) -> why they may stay.
STAGED = "into a staging folder of a random name"
ALLOWED = {
    ("output/console.py", "os.open"): "the null device, in the place of a stream that is gone",
    ("data/read.py", "TemporaryFile"): "a file without a name, for Parquet that is packed",
    ("kernels/native/build.py", "os.open"): "for reading",
    ("kernels/native/build.py", "TemporaryDirectory"): "a random name in a folder that only the user writes to",
    ("runs/folder.py", "FileLock"): "which follows no link and does not change the file",
    ("evaluation/compare/search.py", "JournalFileBackend"): "Optuna's; links are refused before",
    ("runs/plots.py", "savefig"): "into memory",
    ("training/checkpoint.py", "save_file"): STAGED,
    ("adapters/peft_files.py", "save_file"): STAGED,
    ("adapters/peft_files.py", "save_pretrained"): STAGED,
    ("models/base.py", "save_file"): STAGED,
    ("training/result.py", "save_pretrained"): STAGED,
    ("commands/merge.py", "save_pretrained"): STAGED,
    ("models/load.py", "save_pretrained"): STAGED,
    ("models/gguf_convert.py", "save_pretrained"): STAGED,
    ("models/gguf_convert.py", "TemporaryDirectory"): "an empty folder of a random name",
    ("models/load.py", "TemporaryDirectory"): "a folder of a random name, for itself alone",
    ("models/load.py", "write_text"): "into that folder",
    ("kernels/device.py", "write_text"): "the kernel's file that resets this process's peak",
    ("files/json_files.py", "os.open"): "for reading",
    ("files/staging.py", "os.open"): "a folder, to lock it",
    ("models/shards.py", "copyfile"): STAGED,
    ("models/shards.py", "open"): STAGED,
    ("models/shards.py", "save_file"): STAGED,
    ("export/gguf_file.py", "GGUFWriter"): STAGED,
    ("export/gguf_file.py", "open"): STAGED,
}
WRITERS = {
    "copy2", "copyfile", "copytree", "copyfileobj", "savefig", "save_file", "save_pretrained",
    "symlink_to", "hardlink_to", "touch", "mkfifo", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory",
    "mkstemp", "mkdtemp", "FileLock", "SoftFileLock", "JournalFileBackend", "memmap", "GGUFWriter", "SummaryWriter",
    "FileHandler", "tofile", "savetxt", "savez", "to_json", "to_csv", "to_parquet", "write_table", "FileIO",
}  # fmt: skip
READING = re.compile(r"[rbt]+")


def writing_calls(path: Path) -> Iterator[str]:
    """What in a file of the package opens for writing, as its call reads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else ""
        of_path = isinstance(called, ast.Attribute) and name in ("write_text", "write_bytes")
        of_arrays = owner in ("torch", "np", "numpy") and name.startswith("save")
        if owner == "os" and name == "open":
            yield "os.open"
        elif name == "open" and owner != "webbrowser" and not _reads(node):
            yield "open"
        elif of_path or of_arrays or name in WRITERS:
            yield name


def _reads(call: ast.Call) -> bool:
    """Whether an open, of any kind, is for reading: by its constant mode, or without one."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    of_path = isinstance(call.func, ast.Attribute) and not (
        isinstance(call.func.value, ast.Name) and call.func.value.id in ("io", "gzip", "codecs")
    )
    modes += call.args[0 if of_path else 1 :][:1]
    if any(keyword.arg in (None, "opener") for keyword in call.keywords):
        return False
    return all(isinstance(mode, ast.Constant) and READING.fullmatch(str(mode.value)) for mode in modes)


def test_one_module_opens_for_writing() -> None:
    package = ROOT / "qingtune"
    found = {
        (path.relative_to(package).as_posix(), call)
        for path in package.rglob("*.py")
        if path != package / "files" / "write.py"
        for call in writing_calls(path)
    }
    assert found == set(ALLOWED)
