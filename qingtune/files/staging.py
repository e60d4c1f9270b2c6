"""Folders made next to where they belong and moved into place when they are whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qingtune.files.write import LONGEST_NAME, flush


@contextmanager
def staging_folder(target: Path) -> Generator[Path]:
    """A new folder next to a path, on the same disk; removed at the end unless it was moved.

    It is locked while its process lives; those of killed processes next to this path are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(target)
    folder, handle = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new staging folder with its lock."""
    while True:
        folder = target.with_name(f"{_staging_prefix(target)}{secrets.token_hex(8)}.unfinished")
        folder.mkdir(mode=0o700)
        handle = _lock(folder, wait=True)
        if handle is None or folder.exists():  # else another process took it for a dead one's just before the lock
            return folder, handle
        os.close(handle)


def remove_left_behind(target: Path) -> bool:
    """Remove what dead processes staged next to this path; returns whether a living one stages something there."""
    alive = False
    for folder in _staging_folders(target):
        handle = _lock(folder, wait=False)
        if handle is None:
            alive = True
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
    return alive


def _staging_folders(target: Path) -> list[Path]:
    name = re.compile(re.escape(_staging_prefix(target)) + r"[0-9a-f]{16}\.unfinished")
    around = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in around if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _staging_prefix(target: Path) -> str:
    return f".{target.name.encode(errors='replace')[:LONGEST_NAME].decode(errors='ignore')}-"


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that locks a folder until it is closed or the process ends; None if the lock is not available."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another; or of a disk that has no locks
        os.close(handle)
        return None
    return handle


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a staged folder to its place, which must not exist or be an empty folder, flushed to the disk and with the
    usual permissions."""
    for path in folder.rglob("*"):
        usual_permissions(path)
        flush(path)
    usual_permissions(folder)
    flush(folder)
    if os.name == "nt" and target.is_dir():
        target.rmdir()
    os.rename(folder, target)
    flush(target.parent)


def usual_permissions(path: Path) -> None:
    """Give a file or folder the permissions of new ones; temporary ones are closed to others."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
