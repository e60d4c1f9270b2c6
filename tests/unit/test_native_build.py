"""Kernels in C are compiled once, into a folder of the user's own, and told to be missing where they are."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qingtune.kernels.native import build
from qingtune.kernels.native.build import has_native_units, native_library


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


@pytest.mark.skipif(not has_native_units(), reason="needs AVX-512 with int8 units")
def test_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library()
    if isinstance(library, str):
        pytest.skip(library)
    (file,) = fresh.iterdir()
    assert isinstance(library, ctypes.CDLL)
    before = file.stat().st_mtime_ns
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]
    file.unlink()  # not written over: this process runs it
    file.write_bytes(b"cut off")
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    source = fresh.parent / "other.c"
    source.write_text(build.SOURCE.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)
    native_library.cache_clear()
    assert isinstance(native_library(), ctypes.CDLL)
    assert len(list(fresh.iterdir())) == 2


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


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QINGTUNE_NATIVE", "0")
    assert native_library() == "QINGTUNE_NATIVE is 0"


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_folder_that_others_write_to_is_not_trusted(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert "others can write to" in str(native_library())
    assert list(fresh.iterdir()) == []
