"""Digests of files, and manifests that show whether a folder is complete."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qingtune.errors import UserError
from qingtune.files.json_files import INDEX_BYTES, open_plain, read_object
from qingtune.files.write import write_json

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a plain file, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be opened or is no plain file, such as a pipe.
    """
    digest = hashlib.sha256()
    with open_plain(path) as file:
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
        files = dict(read_object(folder / MANIFEST, INDEX_BYTES)["files"])
        for name, known in files.items():
            path = folder / Path(name).name
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {known['bytes']:,}"
            if sha256_of(path) != known["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    return None
