"""No file, however it is packed, takes more memory than the settings allow; a row that is too large is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_jsonl

from qingtune.data import read as read_module
from qingtune.data import rules as rules_module
from qingtune.data.format import read_conversations
from qingtune.data.prompts import rows_with_prompts
from qingtune.data.read import Fault, Row, read_rows
from qingtune.data.rules import MemoryBound, Rules
from qingtune.errors import UserError

SMALL = Rules(max_row_mb=0.001)  # 1,000 bytes
LONG = "x" * 5_000
TOO_LARGE = "a row over 0.001 MB; raise max_row_mb if this is intended"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(name: str, content: bytes, rules: Rules = SMALL) -> list[Row | Fault]:
    Path(name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return list(read_rows(name, rules))


def as_parquet(*texts: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), file, **options)
    return file.getvalue()


def as_nested_parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


# --- A row -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_large_line_is_a_fault_and_the_others_are_read(zipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "PIECE", 100)
    lines = [b'{"a": 1}', json.dumps({"a": LONG}).encode(), b'{"a": 3}', b'"' + LONG.encode()]
    name = f"t.jsonl{zipped}"
    assert [(row.origin, isinstance(row, Fault)) for row in rows_of(name, b"\n".join(lines))] == [
        (f"{name}:1", False), (f"{name}:2", True), (f"{name}:3", False), (f"{name}:4", True),
    ]  # fmt: skip
    assert next(str(row) for row in read_rows(name, SMALL) if isinstance(row, Fault)) == f"{name}:2: {TOO_LARGE}"


@pytest.mark.parametrize("row", [b'{"a": 1}\n', b"a\n1\n"], ids=["jsonl", "csv"])
def test_blank_lines_between_two_rows_have_the_bound_of_a_row(row: bytes) -> None:
    name = "t.csv.gz" if b"a\n" in row else "t.jsonl.gz"
    blank = b"\n" * 900
    assert len(rows_of(name, row + blank + row[-9:] + blank + row[-9:])) >= 2
    with pytest.raises(UserError) as caught:
        rows_of(name, row + b"\n" * 2_000)
    assert str(caught.value).endswith("over 0.001 MB of blank lines. Remove them from the file.")


def test_a_line_is_never_read_whole_that_is_too_large() -> None:
    asked: list[int] = []

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            asked.append(size)
            return b"x" * size if len(asked) < 5 else b"\n" if len(asked) == 5 else b""

    (fault,) = read_module._read_jsonl(Endless(), "t.jsonl", SMALL)  # pyright: ignore
    assert isinstance(fault, Fault)
    assert 0 < min(asked) <= max(asked) <= read_module.PIECE


def test_a_large_item_of_a_list_ends_the_reading() -> None:
    with pytest.raises(UserError) as caught:
        rows_of("t.json", f'[{{"a": 1}},\n{json.dumps({"a": LONG})}]'.encode())
    assert str(caught.value) == f"t.json:2: {TOO_LARGE}"


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_large_list_is_refused_before_more_of_it_is_read(zipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"[" + b'{"a": 1},\n' * 200 + b"{}]"
    assert len(rows_of(f"t.json{zipped}", content)) == 201
    with pytest.raises(UserError) as caught:
        rows_of(f"t.json{zipped}", content, Rules(max_data_gb=4e-6))
    assert str(caught.value) == (
        f"t.json{zipped}: over 0.0 MB, and a JSON list is held in memory as a whole. Convert it to .jsonl, which has "
        "no such limit, for example with `jq -c '.[]'`; or raise max_data_gb."
    )
    monkeypatch.setattr(read_module, "MOST_LIST_BYTES", 1_500_000)
    with pytest.raises(UserError) as caught:
        rows_of(f"t.json{zipped}", content + b" " * 1_500_000)
    assert str(caught.value) == (
        f"t.json{zipped}: over 1.5 MB, and a JSON list is held in memory as a whole. Convert it to .jsonl, which has "
        "no such limit, for example with `jq -c '.[]'`."
    )


@pytest.mark.parametrize(
    "text",
    [
        f"a,b\n1,2\n3,{LONG}\n",
        'a,b\n1,2\n3,"' + "x\n" * 2_000 + '"\n',
        "a,b\n1,2\n" + "3," * 2_000 + "\n",
        "a,b\n1,2\n" + LONG,
    ],
    ids=["cell", "cell of many lines", "many cells", "no line end"],
)
def test_a_large_record_of_csv_ends_the_reading(text: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of("t.csv", text.encode())
    assert str(caught.value) == f"t.csv:3: {TOO_LARGE}"


def test_many_small_records_of_csv_are_read() -> None:
    assert len(rows_of("t.csv", b"a,b\n" + b'1,"2\n3"\n' * 1_000)) == 1_000


def test_a_large_first_line_of_csv_is_named() -> None:
    with pytest.raises(UserError) as caught:
        rows_of("t.csv", b"a," * 5_000)
    assert str(caught.value) == f"t.csv:1: {TOO_LARGE}"


@pytest.mark.parametrize("make", [as_parquet, as_nested_parquet])
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_large_row_of_parquet_is_a_fault(make: Callable[..., bytes], zipped: str) -> None:
    name = f"t.parquet{zipped}"
    found = rows_of(name, make("a", LONG, "b" * 500, LONG, *"c" * 100))
    assert [row.origin for row in found if isinstance(row, Fault)] == [f"{name}:2", f"{name}:4"]
    assert [row.origin for row in found] == [f"{name}:{number}" for number in range(1, 105)]


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"compression": "zstd"}], ids=str)
def test_values_of_parquet_are_as_they_were(options: dict[str, Any]) -> None:
    texts = ["a", "店" * 10, "a", "", None, "b" * 200] * 50
    found = rows_of("t.parquet", as_parquet(*texts, **options))  # pyright: ignore[reportArgumentType]
    assert [row.values for row in found if isinstance(row, Row)] == [{"text": text} for text in texts]


def test_texts_that_repeat_are_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of kilobytes whose rows would be 3 GB: the column stays a dictionary until its size is known."""
    text = "x" * 1_000_000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3_000, pyarrow.int32()), [text])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file, compression="zstd")
    content = file.getvalue()
    assert len(content) < 100_000
    before = pyarrow.default_memory_pool().max_memory()
    found = rows_of("t.parquet", content)
    assert all(isinstance(row, Fault) for row in found)
    assert len(found) == 3_000
    assert pyarrow.default_memory_pool().max_memory() - before < 50_000_000


def test_the_setting_raises_the_bound() -> None:
    line = json.dumps({"text": LONG}).encode()
    assert isinstance(rows_of("t.jsonl", line)[0], Fault)
    assert isinstance(rows_of("t.jsonl", line, Rules(max_row_mb=0.01))[0], Row)


# --- All rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"text": "t" * 100}, {"text": ""}], ids=["rows", "faults"])
def test_rows_that_are_kept_may_take_so_much_memory(row: dict[str, Any]) -> None:
    path = str(write_jsonl(Path("t.jsonl"), [row] * 500))
    with pytest.raises(UserError) as caught:
        read_conversations([path], None, "skip", Rules(max_data_gb=1e-4))
    where, what = str(caught.value).split(": ", 1)
    assert where.startswith("t.jsonl:")
    assert what == "the rows up to this one take over 0.1 MB of memory. Use fewer rows, or raise max_data_gb."


def test_prompts_that_are_kept_too() -> None:
    path = str(write_jsonl(Path("t.jsonl"), [{"prompt": "p" * 100}] * 500))
    with pytest.raises(UserError, match="max_data_gb"):
        list(rows_with_prompts(path, Rules(max_data_gb=1e-4)))


def test_half_of_the_free_memory_is_the_bound_where_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "free_ram_bytes", lambda: 1_000_000_000)
    room = MemoryBound(Rules())
    room.take(500_000_000, "t:1")
    with pytest.raises(
        UserError, match=r"t:2: the rows up to this one take over 750.0 MB of memory, half of what was free"
    ):
        room.take(250_000_001, "t:2")


def test_packed_parquet_is_unpacked_on_the_disk_and_no_further_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_module, "PIECE", 1_000)
    with pytest.raises(UserError, match=r"t.parquet.gz: over 0.1 MB when unpacked. Unpack it, or raise max_data_gb"):
        rows_of("t.parquet.gz", b"\0" * 200_000, Rules(max_data_gb=1e-4))


# --- Work ------------------------------------------------------------------------------------------------------------


def test_a_repeated_name_among_many_is_found_in_one_pass() -> None:
    class Counted(str):
        __slots__ = ()
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, str(other))

    names = [Counted(number) for number in range(5_000)]
    assert rules_module.first_repeated([*names, Counted("4999")]) == "4999"
    assert Counted.compared < 50_000


def test_wide_csv_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([[f"c{number}" for number in range(50_000)], ["1"] * 50_000])
    (row,) = rows_of("t.csv", text.getvalue().encode(), Rules())
    assert isinstance(row, Row)
    assert len(row.values) == 50_000
