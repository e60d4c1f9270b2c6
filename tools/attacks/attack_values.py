"""Values and texts that nothing should be asked to take, and ways to spoil a file."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attack_case import Argv, Case, Expected, Place, Spoil

DEEP = 100_000
WRONG_TYPES: tuple[Any, ...] = ("eight", "8", None, True, [8], {"value": 8}, [], "")
WRONG_NUMBERS: tuple[Any, ...] = (0, -1, 2.5, 10**9, 10**30, float("nan"), float("inf"), -(2**63))
ESCAPES = "\x1b]52;c;cHduZWQ=\x07\x1b]0;pwned\x07\x1b[2J\u202eevil\x9d0;t\x9c"


def shown(value: Any) -> str:
    """A value as a part of a case's name."""
    if value is True or value is False or value is None:
        return str(value)
    return f"{value!r}"[:40].replace(" ", "") if value != "" else "empty"


def deep_json(kind: str = "list") -> bytes:
    """JSON nested a hundred thousand deep."""
    return b"[" * DEEP + b"]" * DEEP if kind == "list" else b'{"a":' * DEEP + b"1" + b"}" * DEEP


# What can be wrong with any JSON file, by name: bytes that stand in its place, or a function of its content.
BROKEN_JSON: Mapping[str, bytes | Callable[[bytes], bytes]] = {
    "empty": b"",
    "only-space": b" \n\t ",
    "cut": lambda content: content[: len(content) // 2],
    "deep-list": deep_json(),
    "deep-object": deep_json("object"),
    "deep-value": lambda content: content.rstrip()[:-1] + b', "deeper": ' + deep_json() + b"}",
    "a-list": b"[]",
    "a-text": b'"text"',
    "a-number": b"7",
    "null": b"null",
    "not-utf8": b'{"model_type": "\xff\xfe"}',
    "utf16": '{"model_type": "qwen2"}'.encode("utf-16"),
    "null-bytes": b"\0" * 200,
    "huge-number": lambda content: content.rstrip()[:-1] + b', "n": ' + b"9" * 5000 + b"}",
    "trailing-comma": lambda content: content.rstrip()[:-1] + b",}",
    "two-objects": lambda content: content + content,
    "html": b"<html><body>404 Not Found</body></html>",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "gigabyte-of-spaces": lambda content: content + b" " * (300 << 20),
    "lone-surrogate": lambda content: content.rstrip()[:-1] + rb', "x": "\ud83c"}',
}
HARMLESS_JSON: Mapping[str, Callable[[bytes], bytes]] = {
    "windows-line-ends": lambda content: content.replace(b"\n", b"\r\n"),
    "extra-keys": lambda content: content.rstrip()[:-1] + b', "a_new_key_of_tomorrow": {"a": [1, 2, null]}}',
}


def replaced(name: str, how: bytes | Callable[[bytes], bytes]) -> Spoil:
    """Replace a file's content."""

    def spoil(place: Place) -> None:
        path = place / name
        place.write(name, how(path.read_bytes() if path.exists() else b"") if callable(how) else how)

    return spoil


def edited(name: str, changes: Mapping[str, Any]) -> Spoil:
    """Set values in a JSON file."""
    return lambda place: place.edit_json(name, changes)


def put(name: str, make: Callable[[Path, Place], object]) -> Spoil:
    """Make something in the place of a file or folder."""

    def spoil(place: Place) -> None:
        path = place / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make(path, place)

    return spoil


def linked(name: str, target: str) -> Spoil:
    """Replace a file by a link; `{outside}` is filled in."""
    return put(name, lambda path, place: path.symlink_to(target.format(outside=place.outside, work=place.work)))


def fifo(name: str) -> Spoil:
    """Replace a file by a FIFO that nobody writes to."""
    return put(name, lambda path, _: os.mkfifo(path))


def made_folder(name: str) -> Spoil:
    """Replace a file by a folder."""
    return put(name, lambda path, _: path.mkdir())


def removed(*names: str) -> Spoil:
    """Remove files."""

    def spoil(place: Place) -> None:
        for name in names:
            (place / name).unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after another."""

    def spoil(place: Place) -> None:
        for one in spoils:
            one(place)

    return spoil


def broken_files(
    group: str, name: str, commands: Sequence[Argv], needs: tuple[str, ...], expect: Expected = "refused", **more: Any
) -> Iterator[Case]:
    """A JSON file broken in each way, or no file at all; commands take turns."""
    short = name.rsplit("/", 1)[-1]
    ways: dict[str, Spoil] = {way: replaced(name, how) for way, how in BROKEN_JSON.items()}
    ways |= {"fifo": fifo(name), "folder": made_folder(name), "dangling-link": linked(name, "nowhere")}
    for number, (way, spoil) in enumerate(ways.items()):
        lenient = way in ("huge-number", "lone-surrogate", "gigabyte-of-spaces", "deep-value")
        argv = commands[number % len(commands)]
        wanted: Expected = "either" if lenient else expect
        yield Case(group, f"{short}-{way}", spoil, (argv,), wanted, needs, names=(short,), **more)
    for number, (way, how) in enumerate(HARMLESS_JSON.items()):
        argv = commands[number % len(commands)]
        yield Case(group, f"{short}-{way}", replaced(name, how), (argv,), "fine", needs, **more)


# --- safetensors -----------------------------------------------------------------------------------------------------


def split_safetensors(content: bytes) -> tuple[bytes, bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def join_safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of this header, by default with its true length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
