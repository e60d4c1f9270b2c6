"""JSON is read within limits, and what is in it is checked by its kind."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qingtune.errors import UserError
from qingtune.files.json_files import (
    FLAG,
    TEXT,
    Kind,
    check_fields,
    either,
    list_of,
    number,
    object_of,
    parse_object,
    read_object,
    read_object_if_there,
    whole,
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "a.json: not valid JSON: nested more than 64 deep"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        (b"", "a.json:1:1: not valid JSON"),
        (b'{"a": 1\n "b": 2}', "a.json:2:2: not valid JSON"),
        (b"\xff", "not UTF-8 text"),
        (b"[]", "a JSON object is expected"),
        (b'{"a": 1, "a": 2}', '"a" is given twice'),
        (b'{"a": NaN}', "NaN instead of a number"),
        (b'{"a": ' + b"9" * 41 + b"}", "a number of 41 digits"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_object_is_refused_with_its_place(content: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_object(content, "a.json")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": ' * 64 + b"1" + b"}" * 64, None),
        (b'{"a": "' + b"[" * 1000 + b'"}', {"a": "[" * 1000}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"a": [1, Infinity], "b": 1000000000000000019884624838656}', None),
        ('{"名": "\\u4e2d"}'.encode(), {"名": "中"}),
    ],
)
def test_what_is_unusual_and_sound_is_read(content: bytes, found: dict[str, Any] | None) -> None:
    read = parse_object(content, "a.json")
    assert found is None or read == found


def test_files_of_other_kinds_are_not_waited_for(tmp_path: Path) -> None:
    assert read_object_if_there(tmp_path / "none.json") is None
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(UserError, match=rf"{name}\.json: this is not a regular file"):
            read_object(tmp_path / f"{name}.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"link\.json: the target of this link does not exist"):
        read_object_if_there(tmp_path / "link.json")
    (tmp_path / "large.json").write_bytes(b" " * 2000)
    with pytest.raises(UserError, match=r"large\.json: has more than"):
        read_object(tmp_path / "large.json", most_bytes=1000)


@pytest.mark.parametrize(
    ("kind", "fits", "does_not"),
    [
        (whole(1, 9), [1, 9], [0, 10, 1.0, True, "1", []]),
        (number(above=0, most=1), [0.5, 1], [0, 2, float("inf"), False, "1", 10**400]),
        (TEXT, ["", "a"], [1, ["a"]]),
        (FLAG, [True, False], [0, "true"]),
        (list_of(TEXT), [[], ["a"]], ["a", [1]]),
        (object_of(whole(1)), [{}, {"a": 1}], [[], {"a": 0}]),
        (either(TEXT, whole(0)), ["a", 0], [-1, None, {}]),
    ],
)
def test_a_kind_takes_its_values_alone(kind: Kind, fits: list[Any], does_not: list[Any]) -> None:
    for value in [*fits, None]:  # null means not given
        check_fields({"a": value, "other": object()}, {"a": kind}, "x.json")
    for value in does_not:
        if value is not None:
            with pytest.raises(UserError, match=r'x\.json: "a" is .* is expected'):
                check_fields({"a": value}, {"a": kind}, "x.json")


# Modules that parse JSON by themselves, and of what.
_OWN = {
    "files/json_files": "the reader",
    "config/types": "a flag",
    "data/read": "rows of data, in limits of their own",
    "data/worker": "what our own processes answer",
    "data/worker_process": "what our own process is asked",
    "data/tokenizer_limits": "tokenizer.json, whose vocabulary is larger than other JSON; opened by the reader",
    "data/sealed_tokenizer": "what the tokenizers library has read already",
    "export/gguf_vocab": "what the tokenizers library has read already",
    "evaluation/form": "a row's form, of data that is read already",
    "answering/chat/editor": "lines typed by the user",
    "commands/evaluate": "lines written by this very command",
}


def test_nothing_else_reads_the_json_of_strangers() -> None:
    found: set[str] = set()
    for path in (ROOT / "qingtune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json"
            if named and node.attr in ("load", "loads", "JSONDecoder"):
                found.add(path.relative_to(ROOT / "qingtune").with_suffix("").as_posix())
    assert found == set(_OWN)
