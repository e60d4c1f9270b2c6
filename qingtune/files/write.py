"""Writing so that a result is there whole or not at all.

This is the one module that opens files for writing. Folders of runs and models come from strangers and may contain
links to anywhere: no link is written through, and no name that others could have prepared is written to.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from qingtune.errors import UserError

_BY_FOLDER = {os.open, os.stat, os.unlink, os.rename} <= os.supports_dir_fd  # not so on Windows
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
LONGEST_NAME = 100  # bytes of a name that a hidden one begins with; file systems take 255


# --- Files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one move, flushed to the disk."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move, flushed to the disk; if that fails, nothing of it is left.

    Bytes of file names that are not UTF-8, which Python holds as lone surrogates, are written as `\\udcff`.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move, flushed to the disk; if that fails, nothing of it is left."""
    with replacing(path) as file:
        file.write(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one move."""
    with source.open("rb") as content, replacing(target) as file:
        shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Generator[BinaryIO]:
    """A file to write to that replaces `path` at the end, flushed to the disk; after an error nothing of it is left.

    It is made under a random name in the opened folder: nothing that is already there, a link above all, is written to.

    Args:
        mode: permissions, less the umask.

    Raises:
        UserError: `path` is a link, or no file.
    """
    half_done = f".qingtune-{secrets.token_hex(8)}.tmp"
    with _folder_of(path) as folder:
        folder.refuse_link(path)
        handle = folder.open(half_done, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(handle)
            names = folder.name(half_done), folder.name(path.name)
            os.replace(*names, src_dir_fd=folder.handle, dst_dir_fd=folder.handle)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(folder.name(half_done), dir_fd=folder.handle)
            raise
    flush(path.parent)


def open_in_place(path: Path, *, append: bool = False, mode: int = 0o666) -> io.FileIO:
    """Open a file to read and write in place, created if it is missing; unbuffered.

    Args:
        append: whether everything is written at its end, even if others write to it too.
        mode: permissions of a new file, less the umask.

    Raises:
        UserError: it is a link, or no file.
    """
    with _folder_of(path) as folder:
        folder.refuse_link(path)
        handle = folder.open(path.name, os.O_RDWR | os.O_CREAT | (os.O_APPEND if append else 0), mode)
    file = io.FileIO(handle, "r+")
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # it came after the look at its name
        file.close()
        raise _no_file(path)
    return file


def open_device(path: Path) -> io.FileIO:
    """Open something that exists and is no file for writing, such as /dev/null or a pipe.

    Raises:
        UserError: it is a file after all.
    """
    file = io.FileIO(os.open(path, os.O_WRONLY), "w")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_file(path)
    return file


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links where files will be written, before the work begins.

    Raises:
        UserError: names the first one.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise _no_file(folder / name)


def _no_file(path: Path) -> UserError:
    if path.is_symlink():
        what = f"this is a link (to {os.readlink(path)}), and files are not written through links"
        return UserError(what, where=str(path), fix="Remove the link, or pass its target.")
    what = "this is a folder, not a file" if path.is_dir() else "this is not a regular file"
    return UserError(what, where=str(path), fix="Remove it, or choose another place.")


@dataclass(frozen=True)
class _Folder:
    """A folder that is open: names are looked up in it, whatever happens to its path meanwhile.

    Attributes:
        path: may lead there by links, as output folders on other disks do.
        handle: None where the system cannot look names up in an open folder.
    """

    path: Path
    handle: int | None

    def name(self, name: str) -> str:
        """A name in the folder, for calls that take the handle too."""
        return name if self.handle is not None else str(self.path / name)

    def refuse_link(self, path: Path) -> None:
        """Refuse anything but a file or a missing name."""
        try:
            status = os.stat(self.name(path.name), dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            raise _no_file(path)

    def open(self, name: str, flags: int, mode: int) -> int:
        """A handle of a file, which is no link."""
        return os.open(self.name(name), flags | _NO_LINK, mode, dir_fd=self.handle)


@contextmanager
def _folder_of(path: Path) -> Generator[_Folder]:
    """The folder of a file that is to be written, which the system's errors name."""
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY) if _BY_FOLDER else None
    try:
        yield _Folder(path.parent, handle)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        if handle is not None:
            os.close(handle)


# --- Folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(what: str, where: Path, fix: str) -> Generator[None]:
    """Turn errors of the disk into a UserError; libraries in Rust wrap them in an exception of their own.

    Args:
        what: could not be written.
        where: the folder in which it was to be.
        fix: what the user can do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tokenizers raises a plain Exception: "No space left on device (os error 28)"
        if not (isinstance(error, OSError | SafetensorError) or "(os error " in str(error)):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{what} could not be written: {reason}", where=str(where), fix=fix) from error


def flush(path: Path) -> None:
    """Flush a file or folder to the disk before continuing."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
