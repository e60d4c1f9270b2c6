"""Writing so that a result is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one move."""
    half_done = path.with_name(f".{path.name}.tmp")
    half_done.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(half_done, path)


@contextmanager
def staging_folder(beside: Path) -> Generator[Path]:
    """A new folder next to a path, on the same disk; whatever is left of it at the end is removed."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a staged folder to its place, which must not exist, flushed to the disk and with the usual permissions."""
    for path in folder.iterdir():
        usual_permissions(path)
        flush(path)
    usual_permissions(folder)
    flush(folder)
    os.rename(folder, target)
    flush(target.parent)


def usual_permissions(path: Path) -> None:
    """What a file or folder made plainly would have; temporary ones are closed to others."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def flush(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
