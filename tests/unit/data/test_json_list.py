"""A JSON list read through a window: the same whatever the window's size, and no more read than is needed."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.data import json_list as module
from qingtune.data.json_list import JsonListError, json_list, no_repeats

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BROKEN = [
    '[{"a": 1},\n{"a": }]',
    '[{"a": "x',
    '[{"a": "\\u12',
    '[{"a": 1}\n\n{"a": 2}]',
    "[1,\n]",
    "[1]\n2",
    '[{"a": 1',
    "[tru]",
]


def read(text: str) -> list[tuple[Any, int]]:
    file = io.BufferedReader(io.BytesIO(text.encode()))  # pyright: ignore[reportArgumentType]
    return [(value, line) for value, line, _ in json_list(file, 10_000_000)]


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(VALUES, max_size=5), piece=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans()
)
def test_any_window_gives_what_the_whole_text_holds(
    items: list[Any], piece: int, indent: int | None, ascii: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        found = read(text)
    assert [value for value, _ in found] == items
    lines = text.split("\n")
    assert all(lines[line - 1].strip() for _, line in found)
    assert found == read(text)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("text", BROKEN)
def test_any_window_gives_the_same_error(text: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> tuple[str, int]:
        with pytest.raises(JsonListError) as caught:
            read(text)
        return caught.value.what, caught.value.line

    whole = told()
    monkeypatch.setattr(module, "PIECE", piece)
    assert told() == whole


def test_no_more_is_read_than_the_rows_taken_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 64)
    file = io.BytesIO(b"[" + b'{"a": 1},\n' * 10_000 + b"{}]")
    rows = json_list(file, 1_000)  # pyright: ignore[reportArgumentType]
    assert [next(rows)[:2] for _ in range(50)] == [({"a": 1}, number) for number in range(1, 51)]
    assert file.tell() < 50 * 10 + 2 * 64


def test_a_key_that_comes_twice_is_no_value() -> None:
    with pytest.raises(JsonListError, match='the key "a" comes twice') as caught:
        read('[{"a": 1},\n{"b": {"a": 1, "a": 1}}]')
    assert caught.value.line == 2
    assert no_repeats([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
