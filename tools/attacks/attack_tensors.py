"""Attacks by safetensors files and indexes: headers, offsets, types, values."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from attack_case import EVALUATE, EXPORT, INFER, INFER_ADAPTER, MERGE, TRAIN, Argv, Case, Expected, Place, Spoil
from attack_values import (
    broken_files,
    deep_json,
    fifo,
    join_safetensors,
    linked,
    made_folder,
    removed,
    replaced,
    shown,
    split_safetensors,
)

ALL = ("model", "adapter", "rows.jsonl")
WEIGHTS, ADAPTER, INDEX = (
    "model/model.safetensors",
    "adapter/adapter_model.safetensors",
    "model/model.safetensors.index.json",
)
MERGE_ANY: Argv = (*MERGE, "--allow_other_base", "true")  # or the record of the adapter refuses before the weights do
LOADING: tuple[Argv, ...] = (INFER, TRAIN, MERGE_ANY, EXPORT, EVALUATE)
OF_ADAPTER: tuple[Argv, ...] = (INFER_ADAPTER, MERGE, (*EXPORT, "--lora_model", "adapter"))
Header = dict[str, Any]
HeaderChange = Callable[[Header, int], Any]  # of the header and the length of the data; may return bytes to be written


def changed_header(name: str, change: HeaderChange) -> Spoil:
    """Rewrite the header of a safetensors file, the data as they are."""

    def spoil(place: Place) -> None:
        header, data = split_safetensors((place / name).read_bytes())
        content = json.loads(header)
        raw = change(content, len(data))
        place.write(name, join_safetensors(raw if isinstance(raw, bytes) else json.dumps(content).encode(), data))

    return spoil


def _tensor(field: str, value: Any) -> HeaderChange:
    """Set a field of the first tensor."""

    def change(header: Header, size: int) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name][field] = value(header[name][field], size) if callable(value) else value

    return change


def _twice(**changes: Any) -> HeaderChange:
    """A tensor's entry a second time, with changes: without any, it says the same and is harmless."""

    def change(header: Header, size: int) -> bytes:
        name = next(name for name in header if name != "__metadata__")
        inner = json.dumps(header)[1:-1]
        return ("{" + inner + ", " + json.dumps(name) + ": " + json.dumps(header[name] | changes) + "}").encode()

    return change


def _overlap(header: Header, size: int) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    header[names[1]]["shape"], header[names[1]]["dtype"] = header[names[0]]["shape"], header[names[0]]["dtype"]


def _renamed(to: Callable[[str], str]) -> HeaderChange:
    def change(header: Header, size: int) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[to(name)] = header.pop(name)

    return change


def _set(header: Header, name: str, value: Any) -> None:
    header[name] = value


_EMPTY_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
_HEADERS: dict[str, HeaderChange] = {
    **{f"dtype={shown(value)}": _tensor("dtype", value)
       for value in ("F99", 5, None, "", "f32", "I8", "BOOL", "F8_E4M3", "F64", "U16", ["F32"], "F16", "C64")},
    **{f"shape={shown(value)}": _tensor("shape", value)
       for value in ([], [-1, -1], [2**63], [2**32, 2**32], "32", 5, None, [1.5], [320, "32"], [0], [1] * 1000,
                     [2**64 - 1], [32, 320])},
    **{f"offsets={shown(value)}": _tensor("data_offsets", value)
       for value in ([0, 0], [5, 1], [-8, 8], [0], [0, 2**63], [0, 2**64], "0", None, [1.5, 2.5], [0, 4, 8],
                     [2**62, 2**62 + 4],
                     {"a": 0}, [True, False])},
    "offsets-past-the-end": _tensor("data_offsets", lambda old, size: [size, size + old[1] - old[0]]),
    "offsets-shifted": _tensor("data_offsets", lambda old, size: [old[0] + 3, old[1] + 3]),
    "offsets-shorter": _tensor("data_offsets", lambda old, size: [old[0], old[1] - 4]),
    "overlap": _overlap,
    "same-name-twice": _twice(dtype="I32"),
    "a-tensor-is-a-number": lambda header, size: _set(header, next(n for n in header if n != "__metadata__"), 5),
    "no-fields": lambda header, size: _set(header, next(n for n in header if n != "__metadata__"), {}),
    "metadata-number": lambda header, size: _set(header, "__metadata__", 5),
    "metadata-nested": lambda header, size: _set(header, "__metadata__", {"format": {"a": "b"}}),
    "name-with-dots": _renamed(lambda name: f"../../{name}"),
    "name-with-zero": _renamed(lambda name: f"{name}\0"),
    "name-huge": _renamed(lambda name: name + "x" * 200_000),
    "name-empty": _renamed(lambda name: ""),
    "name-lone-surrogate": _renamed(lambda name: f"{name}\ud83c"),
    "name-escapes": _renamed(lambda name: f"{name}\x1b]0;evil\x07"),
    "list": lambda header, size: b"[]",
    "no-json": lambda header, size: b"{" * 40,
    "deep": lambda header, size: deep_json("object"),
    "empty-object": lambda header, size: b"{}",
    "not-utf8": lambda header, size: b'{"\xff": 1}',
    "many-tensors": lambda header, size: header.update({f"x{n}": _EMPTY_TENSOR for n in range(200_000)}),
}  # fmt: skip
_HARMLESS_HEADERS: dict[str, HeaderChange] = {
    "metadata": lambda header, size: _set(header, "__metadata__", {"format": "pt", "by": "someone"}),
    "no-metadata": lambda header, size: header.pop("__metadata__", None) and None,
    "spaces": lambda header, size: json.dumps(header, indent=1).encode(),
    "same-entry-twice": _twice(),
}
_EITHER = {"metadata-number", "metadata-nested", "many-tensors", "name-huge"}


def _length(value: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", value) + content[8:]


_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "seven-bytes": lambda content: content[:7],
    "length-only": lambda content: content[:8],
    "header-cut": lambda content: content[:200],
    "data-cut-10": lambda content: content[:-10],
    "data-cut-half": lambda content: content[: len(content) // 2],
    "data-longer": lambda content: content + b"\0" * 64,
    "length-0": _length(0),
    "length-huge": _length(2**64 - 1),
    "length-2**62": _length(2**62),
    "length-file": lambda content: _length(len(content))(content),
    "length-1": _length(1),
    "zeros": lambda content: bytes(len(content)),
    "pickle": lambda content: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    "zip": lambda content: b"PK\x03\x04" + content[4:],
    "html": lambda content: b"<html>404</html>",
    "lfs-pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


def _filled(value: float, *, where: str = "all") -> Spoil:
    """Weights of one value, or one such value among the others."""

    def spoil_file(name: str) -> Spoil:
        def spoil(place: Place) -> None:
            header, data = split_safetensors((place / name).read_bytes())
            four = struct.pack("<f", value)
            middle = len(data) // 8 * 4
            new = four * (len(data) // 4) if where == "all" else data[:middle] + four + data[middle + 4 :]
            place.write(name, join_safetensors(header, new))

        return spoil

    return spoil_file(WEIGHTS)


def tensor_cases() -> Iterator[Case]:
    """Weights whose files lie about themselves, in the model and in the adapter."""
    number = 0
    for file, commands, label in ((WEIGHTS, LOADING, "model"), (ADAPTER, OF_ADAPTER, "adapter")):
        for name, how in _FILES.items():
            number += 1
            yield _case(f"{label}-{name}", replaced(file, how), commands[number % len(commands)], file)
        for name, change in _HEADERS.items():
            number += 1
            if label == "adapter" and number % 2:
                continue
            expect: Expected = "either" if name in _EITHER or name in ("dtype='F16'",) else "refused"
            yield _case(f"{label}-{name}", changed_header(file, change), commands[number % len(commands)], file, expect)
        for name, spoil in {
            "fifo": fifo(file),
            "folder": made_folder(file),
            "dangling": linked(file, "nowhere"),
        }.items():
            number += 1
            yield _case(f"{label}-{name}", spoil, commands[number % len(commands)], file)
    for number, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e38)):
        for where in ("all", "one"):
            argv = LOADING[number % len(LOADING)]
            yield _case(f"values-{value}-{where}", _filled(value, where=where), argv, WEIGHTS, "either")
    yield from _index_cases()
    yield from _control_cases()


def _case(name: str, spoil: Spoil, argv: Argv, file: str, expect: Expected = "refused") -> Case:
    short, folder = file.rsplit("/", 1)[-1], file.split("/")[0]
    names = (short, f"{folder}:", f"{folder}/", ".safetensors", "model.", "the model")
    return Case("safetensors", name, spoil, (argv,), expect, ALL, names=names, tty="escapes" in name)


def _index(content: Any) -> Spoil:
    """Weights in two files behind an index of this content; `{names}` are the tensors' names."""

    def spoil(place: Place) -> None:
        header, _ = split_safetensors((place / WEIGHTS).read_bytes())
        names = [name for name in json.loads(header) if name != "__metadata__"]
        first = "model-00001-of-00001.safetensors"
        os.rename(place / WEIGHTS, place / f"model/{first}")
        place.write_json(INDEX, content(names, first) if callable(content) else content)

    return spoil


def _mapped(to: Callable[[str, str], Any]) -> Callable[[list[str], str], Any]:
    return lambda names, first: {"metadata": {}, "weight_map": {name: to(name, first) for name in names}}


def _index_cases() -> Iterator[Case]:
    contents: dict[str, Any] = {
        "up": _mapped(lambda name, first: f"../model/{first}"),
        "outside": _mapped(lambda name, first: "/etc/passwd"),
        "missing": _mapped(lambda name, first: "model-00002-of-00002.safetensors"),
        "pickle": _mapped(lambda name, first: "pytorch_model.bin"),
        "number": _mapped(lambda name, first: 5),
        "null": _mapped(lambda name, first: None),
        "empty-name": _mapped(lambda name, first: ""),
        "folder": _mapped(lambda name, first: "."),
        "null-byte": _mapped(lambda name, first: f"{first}\0"),
        "no-map": {"metadata": {}},
        "map-list": {"weight_map": ["a"]},
        "map-null": {"weight_map": None},
        "map-empty": {"weight_map": {}},
        "one-missing": lambda names, first: {"weight_map": dict.fromkeys(names[1:], first)},
        "unknown-names": lambda names, first: {"weight_map": {f"x{n}": first for n in range(50_000)}},
    }
    for number, (name, content) in enumerate(contents.items()):
        argv = LOADING[number % len(LOADING)]
        yield _case(f"index-{name}", _index(content), argv, INDEX, "either")
    for case in broken_files("safetensors", INDEX, LOADING[:2], ALL, "either"):
        if "-extra-keys" not in case.name and "-windows" not in case.name:
            yield case
    for name, content in {"whole": _mapped(lambda name, first: first)}.items():
        for argv in LOADING[:3]:
            yield Case("safetensors", f"control-index-{name}-{argv[0]}", _index(content), (argv,), "fine", ALL)


def _control_cases() -> Iterator[Case]:
    for number, (name, change) in enumerate(_HARMLESS_HEADERS.items()):
        for file, commands in ((WEIGHTS, LOADING), (ADAPTER, OF_ADAPTER)):
            argv = commands[number % len(commands)]
            label = file.split("/")[0]
            more = (*argv, "--allow_other_base", "true") if "--lora_model" in argv else argv
            spoil = changed_header(file, change)
            yield Case("safetensors", f"control-{label}-{name}", spoil, (more,), "fine", ALL)
    for name, file in (("weights", WEIGHTS), ("adapter", ADAPTER)):
        yield _case(f"no-{name}", removed(file), MERGE, file)
