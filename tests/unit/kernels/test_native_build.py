"""C is compiled once, into a folder of the user's own; where it cannot be, there is a reason instead of a library."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_runs import QLORA4, save_model, train

from qingtune.answering.decoder.native import build as native_answers
from qingtune.kernels.native import build, nf4
from qingtune.kernels.native.build import compiled_library, flags_of_hidden_units
from qingtune.machine.resources import cpu_flags

SMALL = "int doubled(int x) { return 2 * x; }\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are loaded as on Linux")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QINGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("QINGTUNE_NATIVE", raising=False)
    (tmp_path / "small.c").write_text(SMALL, encoding="utf-8")
    caches = compiled_library, build._report, nf4._library
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "cache" / "native"
    for cached in caches:  # what comes after is to find the real ones
        cached.cache_clear()


def declare(library: ctypes.CDLL) -> None:
    """Nothing: the small library's function returns an int."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "small.c"


def substitute(folder: Path, script: str) -> str:
    """A program in the place of a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(
    source: Path, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for file in (source, source.with_name("other.c")):
        assert compiled_library(file, declare) == "there is no C compiler (cc, gcc or clang)"
    line = "Using PyTorch instead of kernels in C (slower): there is no C compiler (cc, gcc or clang)."
    assert reported() == [line]  # for all files at once


def test_a_compiler_that_fails_leaves_nothing(
    source: Path, fresh: Path, tmp_path: Path, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = substitute(
        tmp_path, '[ "$1" = --version ] && echo 1 && exit 0\necho one >&2\necho "no such option" >&2\nexit 1'
    )
    monkeypatch.setenv("CC", compiler)
    assert compiled_library(source, declare) == f"{compiler} failed: no such option"
    assert compiled_library(source, declare, ("-O0",)) == f"{compiler} failed: no such option"
    assert list(fresh.iterdir()) == []
    assert reported() == [f"Using PyTorch for small (slower): {compiler} failed: no such option."]


def test_training_says_what_is_slower_as_a_file_does_not_compile(
    tmp_path: Path, data_file: Path, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'case "$*" in *nf4.c*) echo "nf4.c:1: wrong" >&2; exit 1;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", substitute(tmp_path, refuse))
    train(tmp_path / "output", save_model(tmp_path / "model"), data_file, max_steps=2, **QLORA4)
    line = f"Using PyTorch for unpacking weights of 4 bits (slower): {tmp_path / 'compiler'} failed: nf4.c:1: wrong."
    assert [one for one in reported() if "Using" in one] == [line]


def test_no_work_is_named_that_has_no_file() -> None:
    folders = build.HEADERS, native_answers.SOURCE.parent
    assert set(build.WORK) <= {file.stem for folder in folders for file in folder.glob("*.c")}


def test_what_was_compiled_is_no_library(
    source: Path, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && echo rubbish > "$2"
    shift
done"""
    monkeypatch.setenv("CC", substitute(tmp_path, script))
    assert "the compiled kernels cannot be used" in str(compiled_library(source, declare))
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_cannot_be_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'x")
    assert compiled_library(source, declare) == "CC is not a valid command: No closing quotation"


def test_no_home_folder_is_no_failure(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QINGTUNE_CACHE")

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert "your home folder is not known" in str(compiled_library(source, declare))


def test_functions_are_declared_and_flags_passed(source: Path) -> None:
    source.write_text("double factor(void) { return FACTOR; }\n", encoding="utf-8")

    def returns_double(library: ctypes.CDLL) -> None:
        library.factor.restype = ctypes.c_double

    for factor in (1.5, 2.5):  # other flags, another library
        library = compiled_library(source, returns_double, (f"-DFACTOR={factor}",))
        if isinstance(library, str):
            pytest.skip(library)
        assert library.factor() == factor


def test_a_header_is_part_of_the_source(source: Path) -> None:
    header = source.with_name("factor.h")
    source.write_text('#include "factor.h"\nint factor(void) { return FACTOR; }\n', encoding="utf-8")
    for factor in (2, 3):
        header.write_text(f"#define FACTOR {factor}\n", encoding="utf-8")
        compiled_library.cache_clear()
        library = compiled_library(source, declare)
        if isinstance(library, str):
            pytest.skip(library)
        assert library.factor() == factor


@pytest.mark.skipif("avx512f" not in cpu_flags(), reason="hides AVX-512 of a CPU that has it")
def test_hidden_units_are_not_compiled_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "int wide(void) {\n#ifdef __AVX512F__\nreturn 1;\n#else\nreturn 0;\n#endif\n}\n"
    source.write_text(text, encoding="utf-8")
    for hidden, wide in (("", 1), ("avx512f,avx512_bf16", 0)):
        monkeypatch.setenv("QINGTUNE_CPU_WITHOUT", hidden)
        library = compiled_library(source, declare, flags_of_hidden_units())
        if isinstance(library, str):
            pytest.skip(library)
        assert library.wide() == wide


def test_processes_that_compile_at_the_same_time(source: Path, fresh: Path) -> None:
    if isinstance(found := compiled_library(source, declare), str):
        pytest.skip(found)
    next(fresh.iterdir()).unlink()
    program = (
        "import pathlib, sys\nfrom qingtune.kernels.native.build import compiled_library\n"
        "print(compiled_library(pathlib.Path(sys.argv[1]), lambda library: None).doubled(21))"
    )
    command = [sys.executable, "-c", program, str(source)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 3
    assert len(list(fresh.iterdir())) == 1


COPIES = r"""
[ "$1" = --version ] && echo 1 && exit 0
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && cp LIBRARY "$2" && chmod 775 "$2"
    shift
done"""


@pytest.fixture
def library_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library; the "compiler" copies it."""
    library, compiler = tmp_path / "library.so", shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setenv("CC", substitute(tmp_path, COPIES.replace("LIBRARY", str(library))))
    return library


def test_compiled_once(source: Path, library_path: Path, fresh: Path) -> None:
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    (file,) = fresh.iterdir()
    before = file.stat().st_mtime_ns
    compiled_library.cache_clear()
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]
    file.unlink()  # not written over: this process runs it
    file.write_bytes(b"cut off")
    compiled_library.cache_clear()
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    assert file.stat().st_size == library_path.stat().st_size
    source.write_text(SMALL + "\n", encoding="utf-8")
    compiled_library.cache_clear()
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    assert len(list(fresh.iterdir())) == 2


@pytest.fixture
def kept(source: Path, library_path: Path, fresh: Path) -> Path:
    """The file in the cache."""
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    (file,) = fresh.iterdir()
    assert file.stat().st_mode & 0o777 == 0o700
    compiled_library.cache_clear()
    return file


def made_again(source: Path, file: Path) -> bool:
    before = file.lstat().st_ino
    assert isinstance(compiled_library(source, declare), ctypes.CDLL)
    return file.lstat().st_ino != before


def test_what_only_the_user_can_write_is_loaded_again(source: Path, kept: Path) -> None:
    assert not made_again(source, kept)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_to_is_made_again(mode: int, source: Path, kept: Path) -> None:
    kept.chmod(mode)
    assert made_again(source, kept)


def test_a_library_of_somebody_else_is_made_again(source: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = kept.stat().st_ino
    real = os.fstat

    def fstat(handle: int) -> os.stat_result:
        status = real(handle)
        return os.stat_result((*status[:4], 12345, *status[5:10])) if status.st_ino == theirs else status

    monkeypatch.setattr(os, "fstat", fstat)
    assert made_again(source, kept)


def test_a_link_is_not_followed(source: Path, kept: Path, tmp_path: Path) -> None:
    kept.rename(tmp_path / "theirs.so")
    kept.symlink_to(tmp_path / "theirs.so")
    assert made_again(source, kept)
    assert not kept.is_symlink()


def test_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QINGTUNE_NATIVE", "0")
    assert compiled_library(source, declare) == "QINGTUNE_NATIVE is 0"


def test_a_folder_that_others_write_to_is_not_trusted(source: Path, fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert "others can write to" in str(compiled_library(source, declare))
    assert list(fresh.iterdir()) == []
