"""Paths that users name: refused where they would overwrite an input or cannot be written; and the cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from qingtune.errors import UserError, reason_of, shorten


def refuse_same_file(output: Path, setting: str, inputs: Mapping[str, Iterable[Path]]) -> None:
    """Refuse to write to a file that is read, by whatever name or link.

    Args:
        setting: by which `output` was chosen.
        inputs: files that are read, by what they are in words.

    Raises:
        UserError: `output` is one of them.
    """
    for what, paths in inputs.items():
        for path in paths:
            same_name = os.path.realpath(output) == os.path.realpath(path)
            if same_name or (output.exists() and path.exists() and os.path.samefile(output, path)):
                raise UserError(f"{setting} would replace {what}", where=str(output), fix="Choose another path.")


def refuse_odd_name(path: Path, what: str) -> None:
    """Refuse a path that is not UTF-8: libraries in Rust open none, and no record of a run, which is JSON, can name it.

    Raises:
        UserError: it is such a path; `what` is what it leads to, in words.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        message = f"the path of {what} is not UTF-8, and a run can neither record nor open it everywhere"
        raise UserError(message, where=str(path), fix="Rename it.") from None


def refuse_no_path(path: Path, setting: str) -> None:
    """Refuse a path that no file can have: a name too long, a null byte, links in a circle.

    Raises:
        UserError: it is such a path; names the setting.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} is not a path ({reason_of(error)})", where=shorten(str(path))) from None


def default_cache() -> Path:
    """The folder for what can be made again: downloads, conversions, compiled kernels.

    Raises:
        UserError: there is no home folder to keep it in.
    """
    if chosen := os.environ.get("QINGTUNE_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "qingtune"
    except RuntimeError:
        fix = "Set it, or name a folder for the cache in the environment variable QINGTUNE_CACHE."
        raise UserError("your home folder is not known, as HOME is not set", fix=fix) from None
