"""Writing so that a result is there whole or not at all, and reading so that it is known to be whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qingtune.errors import UserError

MANIFEST = "manifest.json"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one move, flushed to the disk."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move, flushed to the disk."""
    half_done = path.with_name(f".{path.name}.tmp")
    half_done.write_text(text, encoding="utf-8")
    flush(half_done)
    os.replace(half_done, path)
    flush(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one move."""
    half_done = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, half_done)
    os.replace(half_done, target)


@contextmanager
def disk_errors(what: str, where: Path, fix: str) -> Generator[None]:
    """Tell as a UserError what goes wrong with the disk; safetensors wraps such errors in one of its own.

    Args:
        what: could not be written.
        where: the folder in which it was to be.
        fix: what the user can do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{what} could not be written: {reason}", where=str(where), fix=fix) from error


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


# --- Manifests -------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file of a folder with its size and hash, in the folder; its presence says that all are there."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": files})


def why_not_whole(folder: Path) -> str | None:
    """The first way in which a folder is not what its manifest says; None if it is."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
        for name, known in files.items():
            path = folder / Path(name).name
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {known['bytes']:,}"
            if sha256_of(path) != known["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    return None
