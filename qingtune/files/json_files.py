"""JSON files that may come from strangers: read within limits, and what is in them checked before it is used."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from qingtune.errors import UserError, reason_of, shorten

MOST_BYTES = 2 << 20  # of a configuration; the largest known have some hundred kilobytes
INDEX_BYTES = 64 << 20  # of a list of tensors or rows
DEEPEST = 64  # brackets within brackets
MOST_DIGITS = 40  # of a whole number; Transformers writes 10^30 for "no limit"
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def read_object(path: Path, most_bytes: int = MOST_BYTES, *, nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        nan: whether NaN is allowed, as in the logs of a run.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read, has more than `most_bytes`, or holds something else.
    """
    return parse_object(read_bytes(path, most_bytes), str(path), nan=nan)


def read_object_if_there(path: Path, most_bytes: int = MOST_BYTES, *, nan: bool = False) -> dict[str, Any] | None:
    """The same; None if there is no such file."""
    try:
        return read_object(path, most_bytes, nan=nan)
    except FileNotFoundError:
        return None


def read_bytes(path: Path, most_bytes: int, *, pipes: bool = False) -> bytes:
    """What a plain file holds; `pipes` as in open_plain.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is no plain file, or is larger.
    """
    with open_plain(path, pipes=pipes) as file:
        try:
            content = file.read(most_bytes + 1)
        except OSError as error:
            raise UserError(f"cannot be read: {reason_of(error)}", where=str(path)) from None
    if len(content) > most_bytes:
        raise UserError(f"has more than {most_bytes / 1e6:.0f} MB, more than any such file needs", where=str(path))
    return content


def open_plain(path: Path, *, pipes: bool = False) -> BinaryIO:
    """Open a plain file to read; a folder, pipe or device in its place is refused without waiting.

    Args:
        pipes: whether a pipe or a device may take its place, such as /dev/stdin; a pipe that nobody writes to is empty.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be opened, is no plain file, or is a link that leads nowhere.
    """
    fix = "Replace it with the file."
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError("the target of this link does not exist", where=str(path), fix=fix) from None
        raise FileNotFoundError(str(path)) from None
    except (OSError, ValueError) as error:  # Python's own error is for a null byte in the name
        raise UserError(f"cannot be read: {reason_of(error)}", where=str(path)) from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG and not (pipes and kind in (stat.S_IFIFO, stat.S_IFCHR)):
        os.close(handle)
        raise UserError("this is not a regular file", where=str(path), fix=fix)
    if kind != stat.S_IFREG:
        os.set_blocking(handle, True)
    return os.fdopen(handle, "rb")


def parse_object(content: bytes, where: str, *, nan: bool = False) -> dict[str, Any]:
    """A JSON object from UTF-8; `nan` as in read_object.

    Raises:
        UserError: it is something else, nested too deeply, or has a name twice with different values.
    """

    def joined(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next((name for name, value in pairs if found[name] != value), None)
            if twice is not None:
                raise UserError(f'"{shorten(twice)}" is given twice, with different values', where=where)
        return found

    def whole_number(text: str) -> int:
        if len(text) > MOST_DIGITS:
            raise ValueError(f"a number of {len(text):,} digits")
        return int(text)

    def constant(text: str) -> float:
        if text == "NaN" and not nan:
            raise ValueError("NaN instead of a number")
        return float(text)  # some architectures' limits are infinite

    try:
        text = content.decode("utf-8")
        _check_depth(text)
        found: Any = json.loads(text, object_pairs_hook=joined, parse_int=whole_number, parse_constant=constant)
        _check_characters(text, found)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start})", where=where) from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}") from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=where) from None
    if not isinstance(found, dict):
        raise UserError("a JSON object is expected", where=where)
    return cast("dict[str, Any]", found)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def _check_characters(text: str, found: Any) -> None:
    """Refuse halves of surrogate pairs, which come from escapes alone and cannot be written again."""
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is not a character") from None


# --- What is in them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of value; `wanted` says what it is, as in "a number above 0"."""

    wanted: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
NAME = Kind("a name of at most 100 characters", lambda value: isinstance(value, str) and len(value) <= 100)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def whole(least: int, most: int = 2**53) -> Kind:
    """A whole number between two."""
    wanted = f"a whole number of at least {least}" if most == 2**53 else f"a whole number from {least:,} to {most:,}"
    return Kind(wanted, lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> Kind:
    """A finite number between two, `above` excluded."""
    limits = [f"above {above:g}" * (above > -math.inf), f"at least {least:g}" * (least > -math.inf)]
    wanted = " ".join(filter(None, ["a finite number", *limits, f"and at most {most:g}" * (most < math.inf)]))

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) < 1e308 and least <= value <= most and value > above

    return Kind(wanted, fits)


def list_of(kind: Kind) -> Kind:
    """A list, each of its values of a kind."""
    return Kind(f"a list, each {kind.wanted}", lambda value: isinstance(value, list) and _all_fit(kind, value))


def object_of(kind: Kind) -> Kind:
    """An object, each of its values of a kind."""
    wanted = f"an object, each value {kind.wanted}"
    return Kind(wanted, lambda value: isinstance(value, dict) and _all_fit(kind, value.values()))


def _all_fit(kind: Kind, values: Iterable[Any]) -> bool:
    return all(map(kind.fits, values))


def either(*kinds: Kind) -> Kind:
    """One of several kinds."""
    return Kind(" or ".join(kind.wanted for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Check the fields that are used; others are left alone, and null means not given.

    Raises:
        UserError: names the first that is of another kind.
    """
    for name, kind in kinds.items():
        value = content.get(name)
        if value is not None and not kind.fits(value):
            shown = shorten(json.dumps(value, ensure_ascii=False))
            raise UserError(f'"{name}" is {shown}, where {kind.wanted} is expected', where=where)
