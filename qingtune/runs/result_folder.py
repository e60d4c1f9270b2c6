"""The folder of a merged or exported model: whether it may be written or replaced, and the switch, which loses nothing.

A result holds a list of its files with sizes and hashes. Only what such a list names, and what is still as it was
written, is ever removed. A result is made next to its place; then the old one is renamed aside, the new one into its
place, and the old one removed. A process killed in between leaves the old one aside, where the next start finds it.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from qingtune.errors import UserError
from qingtune.files.digests import sha256_of
from qingtune.files.json_files import INDEX_BYTES, read_object
from qingtune.files.paths import refuse_no_path, refuse_odd_name
from qingtune.files.staging import move_into_place, remove_left_behind, staging_folder
from qingtune.files.write import disk_errors, flush, write_json
from qingtune.output.console import say

RESULT_FILES = "qingtune_files.json"
SHOWN = 5  # names in a message
_ELSEWHERE = "Choose another output_dir."
# By which a file is known to be the one that was looked at: size, times of change of content and of anything, number.
_Looks = tuple[int, int, int, int]


# --- The list of a result's files ------------------------------------------------------------------------------------


def list_files(
    folder: Path, place: Path, maker: str, known: Mapping[str, str] | None = None, earlier: Listed | None = None
) -> None:
    """Write the list of a folder's files.

    Args:
        folder: holds the result and nothing else.
        place: where the list is written; the folder, or the one into which its files are moved.
        maker: the command that made it.
        known: SHA-256 of files, by name, that need not be computed again.
        earlier: what the list said before: until its files are replaced, they are known as well.
    """
    listed = {
        name: {"bytes": looks[0], "sha256": (known or {}).get(name) or sha256_of(folder / name)}
        for name, looks in looks_of(folder).items()
        if name != RESULT_FILES
    }
    content = {"made_by": f"qingtune {maker}", "files": listed}
    if earlier and earlier.files:
        content["earlier_files"] = earlier.files
    write_json(place / RESULT_FILES, content)


class Listed:
    """What a folder's list says; nothing where there is none that can be used.

    Attributes:
        maker: the command that made the result; None without a list.
        files: bytes and SHA-256 of each, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.maker: str | None = None
        self.files: dict[str, Any] = {}
        self._earlier: dict[str, Any] = {}
        with suppress(FileNotFoundError, UserError, ValueError, KeyError, TypeError):
            content = read_object(folder / RESULT_FILES, INDEX_BYTES)
            files, earlier = dict(content["files"]), dict(content.get("earlier_files", {}))
            maker = str(content["made_by"]).removeprefix("qingtune ")
            self.files, self._earlier, self.maker = files, earlier, maker

    def why_not(self, name: str) -> str | None:
        """Why a file does not belong to the result as it was written; None if it does."""
        if name == RESULT_FILES and self.maker:
            return None
        path = self._folder / name
        known = [entry for files in (self.files, self._earlier) if isinstance(entry := files.get(name), dict)]
        if not known:
            return "not of it"
        if path.is_symlink() or not path.is_file():
            return "no longer a file"
        now: dict[str, Any] = {"bytes": path.stat().st_size}
        if any(entry.get("bytes") == now["bytes"] for entry in known):
            now["sha256"] = sha256_of(path)
        return None if now in known else "changed since"


def looks_of(folder: Path) -> dict[str, _Looks]:
    """Every file below a folder, by its path in it, and how it looks; links are not followed."""
    found: dict[str, _Looks] = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            status = path.lstat()
            looks = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            found[path.relative_to(folder).as_posix()] = looks
    return found


def shown(names: list[str]) -> str:
    """Names for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- The folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultFolder:
    """A folder for a result of a command: as the user named it, with all links resolved, and what it held then."""

    named: Path
    target: Path
    maker: str
    before: Mapping[str, _Looks]

    @contextmanager
    def staging(self) -> Generator[Path]:
        """A folder next to the place; what is left of it at the end is removed.

        Raises:
            UserError: it cannot be made.
            KeyboardInterrupt: on Ctrl-C; says so if nothing was put in its place.
        """
        with ExitStack() as stack:
            with disk_errors("a folder next to output_dir", self.target.parent, _ELSEWHERE):
                folder = stack.enter_context(staging_folder(self.target))
            try:
                yield folder
            except KeyboardInterrupt:
                raise KeyboardInterrupt("Interrupted: nothing was written." if folder.exists() else "") from None

    def refuse_input(self, name: str, folder: Path | None) -> None:
        """Make sure that a folder that is read is not this one, nor in it, by any name or link; `name` says what it is.

        Raises:
            UserError: it is.
        """
        if folder:
            read = Path(os.path.realpath(folder))
            if self.target in (read, *read.parents):
                raise UserError(f"output_dir contains {name}", where=str(self.named), fix=_ELSEWHERE)

    def put(self, staged: Path, known: Mapping[str, str] | None = None) -> None:
        """Put a staged result in its place, instead of the one that was there when the work began.

        Args:
            staged: the folder that `staging` gave.
            known: SHA-256 of its files, by name, that need not be computed again.

        Raises:
            UserError: the folder changed meanwhile, or the disk refuses; says where the result is.
        """
        list_files(staged, staged, self.maker, known)
        now = looks_of(self.target)
        if changed := sorted(name for name in {*now, *self.before} if now.get(name) != self.before.get(name)):
            raise self._kept_elsewhere(staged, f"output_dir changed while the result was made: {shown(changed)}")
        aside = self.target.with_name(f"{self.target.name}.replaced-{secrets.token_hex(8)}")
        try:
            if now:
                os.rename(self.target, aside)
            move_into_place(staged, self.target)
        except BaseException as error:
            if aside.exists() and not self.target.exists():
                os.rename(aside, self.target)
            if isinstance(error, OSError) and staged.exists():
                raise self._kept_elsewhere(staged, f"output_dir cannot be replaced ({error.strerror})") from error
            raise
        if now:
            _remove_files(aside, self.before)
            if aside.exists():
                say(f"{aside} contains files that appeared in output_dir at the last moment; they are kept there.")

    def _kept_elsewhere(self, staged: Path, why: str) -> UserError:
        """Give a result another name if its place is taken."""
        places = (self.target.with_name(f"{self.target.name}-{number}") for number in count(2))
        place = next(place for place in places if not os.path.lexists(place))
        move_into_place(staged, place)
        return UserError(f"{why}. Nothing was removed; the result is in {place}", where=str(self.named))


def open_result_folder(output_dir: Path, maker: str, what: str, *, overwrite: bool) -> ResultFolder:
    """Make sure before anything is loaded that what a command (`maker`) makes may and can be put in a folder.

    Raises:
        UserError: names what is in the way; with `overwrite`, an earlier result of the same command is not.
    """
    refuse_no_path(output_dir, "output_dir")
    target = Path(os.path.realpath(output_dir))
    refuse_odd_name(target, "output_dir")
    still_written = remove_left_behind(target)
    if still_written:
        raise UserError("another process is writing to this output_dir", where=str(output_dir), fix="Wait for it.")
    _finish_earlier_switch(target)
    if os.path.lexists(target) and not target.is_dir():
        raise UserError("output_dir is a file", where=str(output_dir), fix=_ELSEWHERE)
    _check_place(target, output_dir)
    before = looks_of(target)
    if before or (target.exists() and any(target.iterdir())):
        _check_replaceable(target, output_dir, before, maker, what, overwrite)
    return ResultFolder(output_dir, target, maker, before)


def _check_place(target: Path, output_dir: Path) -> None:
    """Whether a folder there can be renamed."""
    here = Path(os.path.realpath("."))
    fix = f"Choose a folder in it, such as {output_dir / 'model'}."
    if target == here or target in here.parents:
        raise UserError("output_dir is the current folder or a parent of it", where=str(output_dir), fix=fix)
    if _is_mount_point(target):
        raise UserError("output_dir is a mount point", where=str(output_dir), fix=fix)
    around = next(place for place in target.parents if place.exists())
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
        inside = f" {fix}" if target.is_dir() and os.access(target, os.W_OK | os.X_OK) else ""
        raise UserError("output_dir cannot be written", where=str(around), fix=_ELSEWHERE + inside)


def _is_mount_point(path: Path) -> bool:
    """Also of a part of the same disk, as containers mount them."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    places = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in mounts]
    return str(path) in places


def _check_replaceable(
    target: Path, output_dir: Path, before: Mapping[str, _Looks], maker: str, what: str, overwrite: bool
) -> None:
    listed = Listed(target)
    if listed.maker is None:
        found = f"contains files ({shown(sorted(before) or ['empty folders'])}) and no list of what qingtune wrote "
        found += f"({RESULT_FILES}, which version 0.1.0 did not write either); they are left alone"
        fix = "Choose another output_dir, or remove the folder by hand."
    elif listed.maker != maker:
        found, fix = f"contains the result of another command, qingtune {listed.maker}", _ELSEWHERE
    elif theirs := [f"{name} ({reason})" for name in sorted(before) if (reason := listed.why_not(name))]:
        found = f"contains {what} and files that qingtune did not write or that changed: {shown(theirs)}"
        fix = "Move them away, or choose another output_dir."
    elif not overwrite:
        found, fix = f"already contains {what}", "Pass --overwrite_output_dir to replace it."
    else:
        return
    raise UserError(f"output_dir {found}", where=str(output_dir), fix=fix)


def _finish_earlier_switch(target: Path) -> None:
    """Put back, or remove, the earlier result that a killed process had renamed aside."""
    if not target.parent.is_dir():
        return
    name = re.compile(re.escape(target.name) + r"\.replaced-[0-9a-f]{16}")
    for aside in [path for path in target.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]:
        listed = Listed(aside)
        if listed.maker is None:
            continue
        if not os.path.lexists(target):
            os.rename(aside, target)
            flush(target.parent)
        else:
            looks = looks_of(aside)
            _remove_files(aside, {name: of_it for name, of_it in looks.items() if listed.why_not(name) is None})


def _remove_files(folder: Path, known: Mapping[str, _Looks]) -> None:
    """Remove files that are as they were looked at, the list last, and the folders that are empty then."""
    now = looks_of(folder)
    for name in sorted(known, key=lambda name: (name == RESULT_FILES, name)):
        if now.get(name) == known[name]:
            (folder / name).unlink()
    remove_empty_folders(folder)


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and those in it as far as they hold no files, which stay."""
    for where, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it holds files
            os.rmdir(where)
