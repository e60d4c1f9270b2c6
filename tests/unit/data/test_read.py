"""Files -> rows: every kind of file, plain and gzipped, with the right lines named and nothing lost in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qingtune.data.read import SUFFIXES, Fault, Row, read_rows
from qingtune.errors import UserError

ROWS = [
    {"instruction": "写一条笔记。", "output": "七点出炉，热的 🥖"},
    {"instruction": 'Say "hi", twice', "output": "one\ntwo"},
    {"instruction": "  spaces  ", "output": "a\u2028b\u0085c"},  # line ends to some, not in these formats
]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


CONTENT: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
}
TEXT_KINDS = [".jsonl", ".json", ".csv"]
Read = Callable[[str, "bytes | str"], list["Row | Fault"]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a file of this name and content, from its folder, so that origins are short."""
    monkeypatch.chdir(tmp_path)

    def read_content(name: str, content: bytes | str) -> list[Row | Fault]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(name))

    return read_content


def values(rows: list[Row | Fault]) -> list[dict[str, Any]]:
    assert [row for row in rows if isinstance(row, Fault)] == []
    return [row.values for row in rows if isinstance(row, Row)]


def origins(rows: list[Row | Fault]) -> list[str]:
    return [row.origin for row in rows]


# --- Kinds of files --------------------------------------------------------------------------------------------------


def test_all_kinds_are_tried_here() -> None:
    assert set(CONTENT) == set(SUFFIXES)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("kind", SUFFIXES)
def test_every_kind_gives_the_same_rows(read: Read, kind: str, zipped: bool) -> None:
    content = CONTENT[kind](ROWS)
    assert values(read(f"a{kind}.gz", gzip.compress(content, mtime=0)) if zipped else read(f"a{kind}", content)) == ROWS


@pytest.mark.parametrize("name", ["A.JSONL", "a.b.Json", "a.JSONL.GZ"])
def test_the_case_of_the_suffix_does_not_matter(read: Read, name: str) -> None:
    content = CONTENT[".json" if name == "a.b.Json" else ".jsonl"](ROWS)
    assert values(read(name, gzip.compress(content, mtime=0) if name.endswith("GZ") else content)) == ROWS


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_byte_order_mark_is_no_part_of_the_text(read: Read, kind: str, zipped: bool) -> None:
    content = b"\xef\xbb\xbf" + CONTENT[kind](ROWS)
    assert values(read(f"a{kind}.gz", gzip.compress(content, mtime=0)) if zipped else read(f"a{kind}", content)) == ROWS


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_windows_line_ends_do_not_matter(read: Read, kind: str) -> None:
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    content = CONTENT[kind](rows).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert values(read(f"a{kind}", content)) == rows


def test_parquet_rows_are_counted(read: Read) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}], "n": number} for number in range(3)]
    found = read("a.parquet", as_parquet(rows))
    assert values(found) == rows
    assert origins(found) == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_kinds_that_can_be_empty_give_no_rows(read: Read, kind: str) -> None:
    content = {".jsonl": "", ".json": "[]", ".csv": "a,b\n"}[kind]
    assert read(f"a{kind}", content) == []
    assert read(f"a{kind}.gz", gzip.compress(content.encode(), mtime=0)) == []


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_jsonl_and_csv_give_no_rows(read: Read, content: str) -> None:
    assert read("a.jsonl", content) == []
    assert read("a.csv", content) == []


# --- Lines -----------------------------------------------------------------------------------------------------------


def test_jsonl_lines_are_counted_over_blank_ones(read: Read) -> None:
    assert origins(read("a.jsonl", '\n{"a": 1}\r\n  \n\n{"a": 2}')) == ["a.jsonl:2", "a.jsonl:5"]


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_csv_columns_are_told_by_what_stands_between_their_names(read: Read, mark: str) -> None:
    rows = read("a.csv", f'a{mark}b\n"x,y;z\t"{mark}2\n')
    assert [row.values for row in rows if isinstance(row, Row)] == [{"a": "x,y;z\t", "b": "2"}]


def test_csv_lines_are_counted_over_cells_of_several_lines(read: Read) -> None:
    rows = read("a.csv", 'a,b\n"one\ntwo\n\nfour",x\n\n3,"y\nz"\n5,6\n')
    assert values(rows) == [{"a": "one\ntwo\n\nfour", "b": "x"}, {"a": "3", "b": "y\nz"}, {"a": "5", "b": "6"}]
    assert origins(rows) == ["a.csv:2", "a.csv:7", "a.csv:9"]


def test_csv_lines_are_counted_with_a_first_line_of_several_lines(read: Read) -> None:
    assert origins(read("a.csv", '"a\nb",c\r\n1,"2\r\n3"\r\n4,5\r\n')) == ["a.csv:3", "a.csv:5"]


def test_json_list_names_the_line_on_which_an_object_starts(read: Read) -> None:
    rows = read("a.json", '\n[\n  {"a":\n    1}, {"a": 2},\n\n  {"a": "x\\ny"}\n  , {"a": 4}\n]\n')
    assert values(rows) == [{"a": 1}, {"a": 2}, {"a": "x\ny"}, {"a": 4}]
    assert origins(rows) == ["a.json:3", "a.json:4", "a.json:6", "a.json:7"]


# --- Rows that cannot be used: named, the others read ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": 1', "not valid JSON: Expecting ',' delimiter (column 8)"),
        ('{"a": 1\r', "not valid JSON: Expecting ',' delimiter (column 8)"),
        ("{'a': 1}", "not valid JSON: "),
        ('{"a": 1} {"b": 2}', "not valid JSON: Extra data"),
        ('{"a": 1, "a": 2}', 'not valid JSON: the key "a" comes twice'),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ('{"a": ' + "1" * 5_000 + "}", "not valid JSON"),
        ("[1]", "expected a JSON object, not a list"),
        ('"text"', "expected a JSON object, not a text"),
        ("3.5", "expected a JSON object, not a number"),
        ("true", "expected a JSON object, not true or false"),
        ("null", "expected a JSON object, not null"),
        ("写一条".encode("gbk"), "not UTF-8 text; a file from Excel or an older Windows may be GBK"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_broken_jsonl_line_is_a_fault_and_the_others_are_read(read: Read, line: str | bytes, reason: str) -> None:
    content = b'{"a": 1}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"a": 3}\n'
    before, fault, after = read("a.jsonl", content)
    assert isinstance(fault, Fault)
    assert fault.reason.startswith(reason)
    assert str(fault) == f"a.jsonl:2: {fault.reason}"
    assert values([before, after]) == [{"a": 1}, {"a": 3}]
    assert after.origin == "a.jsonl:3"


def test_json_list_items_that_are_no_objects_are_faults(read: Read) -> None:
    rows = read("a.json", '[{"a": 1},\n5,\n[{"a": 2}],\n{"a": 3}]')
    assert rows[1:3] == [
        Fault("a.json:2", "expected a JSON object, not a number"),
        Fault("a.json:3", "expected a JSON object, not a list"),
    ]
    assert values([rows[0], rows[3]]) == [{"a": 1}, {"a": 3}]


def test_csv_rows_of_another_width_are_faults(read: Read) -> None:
    rows = read("a.csv", "a,b\n1\n2,3\n4,5,6\n")
    assert origins(rows) == ["a.csv:2", "a.csv:3", "a.csv:4"]
    assert [str(row) for row in rows if isinstance(row, Fault)] == [
        "a.csv:2: 1 cells, but the header has 2 columns",
        "a.csv:4: 3 cells, but the header has 2 columns",
    ]


# --- Files that cannot be used ---------------------------------------------------------------------------------------

ZIPPED = gzip.compress(as_jsonl(ROWS) * 500, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.txt", "x", "a.txt: ", "this file type is not supported"),
        ("a.jsonl.zip", "x", "a.jsonl.zip: ", "this file type is not supported"),
        ("a.json", "", "a.json: ", "expected a list of objects"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json: ", "expected a list of objects"),
        ("a.json", '[{"a": 1},\n{"a": }]', "a.json:2: ", "not valid JSON"),
        ("a.json", '[{"a": 1}\n\n{"a": 2}]', "a.json:3: ", "not valid JSON"),
        ("a.json", '[{"a": 1},\n', "a.json:", "not valid JSON"),
        ("a.json", '[{"a": 1}', "a.json:1: ", "not valid JSON"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "a.json:2: ", "not valid JSON"),
        ("a.json", '[{"a": 1},\n]', "a.json:2: ", "not valid JSON"),
        ("a.json", "[1]\n2", "a.json:2: ", "not valid JSON: text follows the end of the list"),
        ("a.json", '[{"a": 1},\n{"b": {"a": 1, "a": 1}}]', "a.json:2: ", 'the key "a" comes twice'),
        ("a.json", '[{"a": 1},\n' + "[" * 100_000, "a.json:2: ", "not valid JSON: nested too deeply"),
        ("a.json", '[\n{"a": ' + "1" * 5_000 + "}]", "a.json:2: ", "not valid JSON"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv:", "not valid CSV"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1: ", '"a"'),
        ("a.json", b"[\n" + '{"a": "店"}]'.encode("gbk"), "a.json:2: ", "not UTF-8 text"),
        ("a.csv", b"a,b\n1,2\n" + "店,名\n".encode("gbk"), "a.csv:3: ", "not UTF-8 text"),
        ("a.parquet", "PAR1 is not enough", "a.parquet: ", "not a valid Parquet file"),
        ("a.jsonl.gz", ZIPPED[:-20], "a.jsonl.gz: ", "the gzip file is broken"),
        ("a.csv.gz", ZIPPED[:-20], "a.csv.gz: ", "the gzip file is broken"),
        ("a.parquet.gz", ZIPPED[:-20], "a.parquet.gz: ", "the gzip file is broken"),
        ("a.jsonl.gz", ZIPPED[:8], "a.jsonl.gz: ", "the gzip file is broken"),
        ("a.jsonl.gz", b'{"a": 1}\n', "a.jsonl.gz: ", "the gzip file is broken"),
        ("a.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, "a.jsonl.gz: ", "the gzip file is broken"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_broken_file_is_an_error_with_its_place(
    read: Read, name: str, content: str | bytes, where: str, what: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(name, content)
    assert str(caught.value).startswith(where)
    assert what in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_utf16_is_never_read_as_rows(read: Read, kind: str, encoding: str) -> None:
    marks = {"utf-16": "", "utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}
    with pytest.raises(UserError, match=r"UTF-16 text. Save the file as UTF-8"):
        read(f"a{kind}", (marks[encoding] + CONTENT[kind](ROWS).decode()).encode(encoding))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        list(read_rows(str(tmp_path / "none.jsonl")))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(str(tmp_path / "folder.jsonl")))


@pytest.mark.parametrize("name", ["none.parquet", "none.csv.gz", "none.parquet.gz"])
def test_missing_file_of_any_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        list(read_rows(str(tmp_path / name)))
