"""Kernels in C are compiled once, into a folder of the user's own, and told to be missing where they are."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qingtune.answering.decoder.native import build
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.files.paths import default_cache


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QINGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("QINGTUNE_NATIVE", raising=False)
    native_library.cache_clear()
    yield tmp_path / "cache" / "native"
    native_library.cache_clear()  # what comes after is to find the real one


def stand_in(folder: Path, script: str) -> str:
    """A program that stands in for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_library() == "there is no C compiler (cc, gcc or clang)"


def test_a_compiler_that_fails_leaves_nothing(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = stand_in(
        tmp_path, '[ "$1" = --version ] && echo 1 && exit 0\necho one >&2\necho "no such option" >&2\nexit 1'
    )
    monkeypatch.setenv("CC", compiler)
    assert native_library() == f"{compiler} failed: no such option"
    assert list(fresh.iterdir()) == []


def test_what_was_compiled_is_no_library(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && echo rubbish > "$2"
    shift
done"""
    monkeypatch.setenv("CC", stand_in(tmp_path, script))
    assert "the compiled kernels cannot be used" in str(native_library())
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "'x")
    assert native_library() == "CC is not a valid command: No closing quotation"


COPIES = r"""
[ "$1" = --version ] && echo 1 && exit 0
while [ $# -gt 0 ]; do
    [ "$1" = -o ] && cp LIBRARY "$2" && chmod 775 "$2"
    shift
done"""


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library as the compiler makes it, in the cache of all tests."""
    if not has_native_units():
        pytest.skip("needs AVX-512 with int8 units")
    native_library.cache_clear()
    library = native_library()
    if isinstance(library, str):
        pytest.skip(library)
    return next((default_cache() / "native").glob("*.so"))


def test_compiled_once(compiled: Path, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", stand_in(tmp_path, COPIES.replace("LIBRARY", str(compiled))))
    assert isinstance(native_library(), ctypes.CDLL)
    (file,) = fresh.iterdir()
    before = file.stat().st_mtime_ns
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]
    file.unlink()  # not written over: this process runs it
    file.write_bytes(b"cut off")
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    assert file.stat().st_size == compiled.stat().st_size
    source = fresh.parent / "other.c"
    source.write_text(build.SOURCE.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    assert len(list(fresh.iterdir())) == 2


@pytest.fixture
def kept(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in the cache, "compiled" by copying a small library of the system's."""
    library = next(iter(sorted(Path("/usr/lib").rglob("libgomp.so.1"))), None)
    if sys.platform != "linux" or library is None:
        pytest.skip("needs Linux's libgomp to stand in for what is compiled")
    monkeypatch.setenv("CC", stand_in(tmp_path, COPIES.replace("LIBRARY", str(library))))
    monkeypatch.setattr(build, "_declare", lambda library: None)
    assert isinstance(native_library(), ctypes.CDLL)
    (file,) = fresh.iterdir()
    assert file.stat().st_mode & 0o777 == 0o700
    native_library.cache_clear()
    return file


def made_anew(file: Path) -> bool:
    before = file.lstat().st_ino
    assert isinstance(native_library(), ctypes.CDLL)
    return file.lstat().st_ino != before


def test_what_only_the_user_can_write_is_loaded_again(kept: Path) -> None:
    assert not made_anew(kept)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_to_is_made_anew(mode: int, kept: Path) -> None:
    kept.chmod(mode)
    assert made_anew(kept)


def test_a_library_of_somebody_else_is_made_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = kept.stat().st_ino
    real = os.fstat

    def fstat(handle: int) -> os.stat_result:
        status = real(handle)
        return os.stat_result((*status[:4], 12345, *status[5:10])) if status.st_ino == theirs else status

    monkeypatch.setattr(os, "fstat", fstat)
    assert made_anew(kept)


def test_a_link_is_not_followed(kept: Path, tmp_path: Path) -> None:
    kept.rename(tmp_path / "theirs.so")
    kept.symlink_to(tmp_path / "theirs.so")
    assert made_anew(kept)
    assert not kept.is_symlink()


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QINGTUNE_NATIVE", "0")
    assert native_library() == "QINGTUNE_NATIVE is 0"


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_folder_that_others_write_to_is_not_trusted(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert "others can write to" in str(native_library())
    assert list(fresh.iterdir()) == []
