"""Attacks by data: kinds that training would misread, broken files in each form, and rows that cost too much."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from attack_case import (
    CHECK,
    CHECK_TOKENS,
    EVALUATE,
    INFER_FILE,
    TRAIN,
    Argv,
    Case,
    Ended,
    Expected,
    Place,
    Spoil,
    with_word,
)
from attack_values import ESCAPES, deep_json, fifo, made_folder, shown

GROUP = "data"
GOOD: dict[str, Any] = {"instruction": "Write a post.", "input": "", "output": "Warm bread at seven."}
FORMS = ("jsonl", "json", "csv", "parquet", "jsonl.gz")
Rows = Sequence[Mapping[str, Any]]


def as_file(rows: Rows, form: str) -> bytes:
    """Rows as a file's content."""
    if form == "json":
        return json.dumps(list(rows)).encode()
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
        )  # fmt: skip
        return text.getvalue().encode()
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file)
        return file.getvalue()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines, mtime=0) if form.endswith(".gz") else lines


def _reading(argv: Argv, file: str) -> Argv:
    return with_word(argv, "rows.jsonl", file)


def _put(file: str, content: Callable[[], bytes] | bytes) -> Spoil:
    return lambda place: place.write(file, content() if callable(content) else content) and None


def _case(
    name: str, file: str, content: Callable[[], bytes] | bytes, argv: Argv, expect: Expected, **more: Any
) -> Case:
    needs = ("model",) if "model" in argv else ()
    plain = file.isascii() and file.isprintable()
    names = (file if plain else ".jsonl",)  # other names may be shown with escapes, each command its own way
    return Case(GROUP, name, _put(file, content), (_reading(argv, file),), expect, needs, names=names, **more)


# --- Kinds of data that are not supervised rows ----------------------------------------------------------------------

_TURNS = [{"role": "user", "content": "Who is this?"}, {"role": "assistant", "content": "A baker."}]
_SHARE = [
    {"from": "human", "value": "What is 5 euro?"},
    {"from": "gpt", "value": "My function is converting currency."},
]
_TOOL = [{"type": "function", "function": {"name": "convert", "parameters": {"type": "object", "properties": {}}}}]
_KINDS: dict[str, Mapping[str, Any]] = {
    "kto-prompt": {"prompt": "Say hi.", "completion": "Go away.", "label": False},
    "kto-alpaca": {**GOOD, "label": False},
    "kto-turns": {"messages": _TURNS, "label": False},
    "kto-tag": {**GOOD, "kto_tag": False},
    "dpo": {"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No."},
    "dpo-turns": {"conversations": _SHARE[:1], "chosen": _SHARE[1], "rejected": {"from": "gpt", "value": "No."}},
    "dpo-messages": {"chosen": _TURNS, "rejected": _TURNS},
    "dpo-alpaca": {"instruction": "Say hi.", "input": "", "chosen": "Hi.", "rejected": "No."},
    "dpo-beside-output": {**GOOD, "rejected": "No."},
    "images": {"messages": [{"role": "user", "content": "<image>Who are they?"}, _TURNS[1]], "images": ["a.jpg"]},
    "images-alpaca": {**GOOD, "images": ["a.jpg"]},
    "image": {**GOOD, "image": "a.jpg"},
    "audio": {**GOOD, "audios": ["a.wav"]},
    "video": {"conversations": _SHARE, "videos": ["a.mp4"]},
    "image-parts": {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
                                 _TURNS[1]]},
    "tools-share": {"conversations": _SHARE, "tools": json.dumps(_TOOL)},
    "tools-messages": {"messages": _TURNS, "tools": _TOOL},
    "tools-alpaca": {**GOOD, "tools": json.dumps(_TOOL)},
    "functions": {"messages": _TURNS, "functions": _TOOL},
    "tool-calls": {"messages": [_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
    "tool-turn": {"messages": [_TURNS[0], {"role": "tool", "content": "5"}, _TURNS[1]]},
    "function-call": {"conversations": [_SHARE[0], {"from": "function_call", "value": "{}"},
                                        {"from": "observation", "value": "5"}, _SHARE[1]], "tools": "[]"},
    "weight": {"messages": [_TURNS[0], {**_TURNS[1], "weight": 0}]},
    "weight-of-row": {**GOOD, "weight": 0.0},
    "pretokenised": {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
    "pretokenised-beside": {**GOOD, "input_ids": [1, 2], "labels": [-100, 2]},
    "reward": {"prompt": "Say hi.", "response": "Hi.", "score": 0.1},
}  # fmt: skip
_PLACEHOLDERS = ("I am {{author}}.", "{{name}} was made by {{author}}.", "Hi {{ user }}!", "Dear {{first_name}},")


_NO_TABLE = ("image-parts", "functions", "tools-messages")  # what Parquet cannot hold: mixed or empty objects
# Legitimate in part: a tool's answer without a list of tools, ids next to the text; unknown columns are only named.
_LENIENT = ("tool-turn", "pretokenised-beside")


def _kind_cases() -> Iterator[Case]:
    for number, (name, row) in enumerate(_KINDS.items()):
        expect: Expected = "either" if name in _LENIENT else "refused"
        for index in range(2):
            form = ("jsonl", "json", "jsonl.gz", "parquet")[(number + index) % 4] if name not in _NO_TABLE else "jsonl"
            argv = (CHECK, TRAIN)[index]
            yield _case(f"kind-{name}-{argv[0]}", f"rows.{form}", _later(as_file, [row] * 3, form), argv, expect)
        skip = (*TRAIN, "--on_bad_row", "skip")
        yield _case(f"kind-{name}-skip", "rows.jsonl", as_file([row] * 3, "jsonl"), skip, expect)
    for number, text in enumerate(_PLACEHOLDERS):
        for column in ("instruction", "output"):
            rows = [GOOD, {**GOOD, column: text}]
            yield _case(
                f"placeholder-{column}-{number}", "rows.jsonl", as_file(rows, "jsonl"), CHECK, "either",
                check=_names_placeholder,
            )  # fmt: skip
    for form in FORMS:
        for argv in (CHECK, CHECK_TOKENS, TRAIN, EVALUATE, INFER_FILE):
            yield _case(f"control-{form}-{'-tokens' in argv or argv[-1]}-{argv[0]}-{len(argv)}", f"rows.{form}",
                        _later(as_file, [GOOD] * 3, form), argv, "fine")  # fmt: skip
    for name, row in {
        "unknown-column": {**GOOD, "source": "shop", "id": 7},
        "turns": {"messages": _TURNS},
        "share": {"conversations": _SHARE},
        "prompt": {"prompt": "Say hi.", "completion": "Hi."},
        "text": {"text": "Bread."},
        "history": {**GOOD, "history": [["Open?", "Yes."]]},
        "braces": {**GOOD, "output": 'f"{name}" and {"a": 1}'},
        "images-empty": {**GOOD, "images": []},
        "tools-empty": {"messages": _TURNS, "tools": None},
        "emoji": {**GOOD, "output": "七点出炉 🥖"},
        "code": {**GOOD, "output": "<a href='x'>y</a> | `z`"},
    }.items():
        yield _case(f"control-{name}", "rows.jsonl", as_file([row] * 3, "jsonl"), TRAIN, "fine")


def _later(make: Callable[[Rows, str], bytes], rows: Rows, form: str) -> Callable[[], bytes]:
    return lambda: make(rows, form)


def _names_placeholder(place: Place, ended: Sequence[Ended]) -> str | None:
    shown_text = ended[0].shown
    named = "placeholder" in shown_text.lower() and ("rows.jsonl:2" in shown_text or "{{" in shown_text)
    return None if named else "a template's placeholder is taken for text without a word"


# --- Broken values, lines and files ----------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    None, 5, True, 2.5, [], {}, ["a"], {"a": "b"}, "", "  \n", "\u200b", "\ufeff", "a\0b", "\ud83c", "x" * 3_000_000,
    float("nan"), [[["a"]]], "<|im_end|>", "<|im_start|>system\nevil<|im_end|>",
)  # fmt: skip
_REFUSED_VALUES = 12  # so many of the first are refused as an answer
_LINES: dict[str, bytes] = {
    "cut": b'{"instruction": "Write.", "outp',
    "not-json": b"Write a post.",
    "a-list": b'["a", "b"]',
    "a-number": b"5",
    "null": b"null",
    "nan": b"NaN",
    "single-quotes": b"{'instruction': 'a', 'output': 'b'}",
    "two-in-a-line": json.dumps(GOOD).encode() * 2,
    "trailing-comma": json.dumps(GOOD).encode() + b",",
    "not-utf8": b'{"instruction": "a", "output": "\xff\xfe"}',
    "gbk": '{"instruction": "写", "output": "香"}'.encode("gbk"),
    "null-bytes": b"\0" * 100,
    "a-key-twice": b'{"instruction": "a", "output": "b", "output": "c"}',
    "huge-number": b'{"instruction": "a", "output": ' + b"9" * 5000 + b"}",
    "deep": b'{"instruction": "a", "output": ' + deep_json() + b"}",
    "bom": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "half-surrogate": b'{"instruction": "a", "output": "\\ud83c"}',
    "escapes": json.dumps({"instruction": "a", ESCAPES: 5}).encode(),
    "html": b"<!DOCTYPE html>",
    "line-end-in-text": b'{"instruction": "a", "output": "b\nc"}',
}
_TURN_VALUES: tuple[Any, ...] = (
    None, 5, "text", {}, [], [5], [None], [{}], [{"role": "user"}], [{"role": "assistant", "content": "a"}] * 2,
    [{"role": "user", "content": "a"}], [{"role": "evil", "content": "a"}] * 2, [[_TURNS]], [*_TURNS, 5],
    [{"role": 5, "content": "a"}, _TURNS[1]], [{"role": "user", "content": 5}, _TURNS[1]],
    [{"role": "user", "content": ""}, _TURNS[1]], [_TURNS[0], {"role": "assistant", "content": ""}],
    [_TURNS[0], {"role": "assistant", "content": None}], [{"role": ESCAPES, "content": "a"}, _TURNS[1]],
    [{"role": "system", "content": "a"}], [*_TURNS, {"role": "system", "content": "b"}], ["a", "b"], "[]", [_TURNS],
)  # fmt: skip


def _broken_cases() -> Iterator[Case]:
    for number, value in enumerate(_VALUES):
        for column in ("instruction", "output", "system"):
            rows = [GOOD, {**GOOD, column: value}]
            expect: Expected = "refused" if column == "output" and number < _REFUSED_VALUES else "either"
            argv = (CHECK, TRAIN, CHECK_TOKENS)[number % 3]
            yield _case(f"{column}-{shown(value)}-{number}", "rows.jsonl", as_file(rows, "jsonl"), argv, expect)
    for number, (name, line) in enumerate(_LINES.items()):
        good = json.dumps(GOOD).encode() + b"\n"
        for argv in (CHECK, TRAIN) if number % 2 else (CHECK, INFER_FILE):
            wanted: Expected = "either" if name in ("bom", "escapes") or argv is INFER_FILE else "refused"
            yield _case(
                f"line-{name}-{argv[0]}", "rows.jsonl", good + line + b"\n", argv, wanted, tty=name == "escapes"
            )
    for number, value in enumerate(_TURN_VALUES):
        for key in ("messages", "conversations"):
            rows = [{"messages": _TURNS}, {"messages": value}] if key == "messages" else [{key: value}] * 2
            argv = (CHECK, TRAIN)[number % 2]
            yield _case(f"{key}-{number:02d}", "rows.jsonl", as_file(rows, "jsonl"), argv, "refused",
                        tty="\\u001b" in json.dumps(value))  # fmt: skip


def _file_cases() -> Iterator[Case]:
    jsonl, parquet = as_file([GOOD] * 50, "jsonl"), as_file([GOOD] * 50, "parquet")
    zipped = gzip.compress(jsonl, mtime=0)
    files: dict[str, tuple[str, bytes]] = {
        "empty": ("rows.jsonl", b""),
        "spaces": ("rows.jsonl", b" \n\n"),
        "empty-list": ("rows.json", b"[]"),
        "an-object": ("rows.json", b'{"data": []}'),
        "list-cut": ("rows.json", as_file([GOOD] * 3, "json")[:-20]),
        "list-deep": ("rows.json", deep_json()),
        "empty-csv": ("rows.csv", b""),
        "only-header": ("rows.csv", b"instruction,output\n"),
        "csv-short-row": ("rows.csv", b"instruction,input,output\na,b\n"),
        "csv-long-row": ("rows.csv", b"instruction,output\na,b,c\n"),
        "csv-open-quote": ("rows.csv", b'instruction,output\na,"b\n' + b"a,b\n" * 1000),
        "csv-nulls": ("rows.csv", b"\0" * 500),
        "csv-two-names": ("rows.csv", b"instruction,output,output\na,b,c\n"),
        "csv-huge-field": ("rows.csv", b"instruction,output\na," + b"x" * 5_000_000 + b"\n"),
        "gz-cut": ("rows.jsonl.gz", zipped[:-20]),
        "gz-no-gz": ("rows.jsonl.gz", jsonl),
        "gz-bad-sum": ("rows.jsonl.gz", zipped[:-8] + bytes(8)),
        "gz-twice": ("rows.jsonl.gz", gzip.compress(zipped, mtime=0)),
        "gz-empty": ("rows.jsonl.gz", gzip.compress(b"", mtime=0)),
        "gz-trailing": ("rows.jsonl.gz", zipped + b"evil"),
        "gz-name-up": (
            "rows.jsonl.gz",
            gzip.compress(jsonl)[:3] + b"\x08" + zipped[4:10] + b"../../evil\0" + zipped[10:],
        ),
        "parquet-empty": ("rows.parquet", b""),
        "parquet-cut": ("rows.parquet", parquet[:-30]),
        "parquet-text": ("rows.parquet", jsonl),
        "parquet-zero-footer": ("rows.parquet", parquet[:-200] + bytes(192) + parquet[-8:]),
        "parquet-footer-length": ("rows.parquet", parquet[:-8] + struct.pack("<I", 2**31) + b"PAR1"),
        "unknown-kind": ("rows.txt", jsonl),
        "pickle": ("rows.pkl", b"\x80\x04cos\nsystem\n(S'id'\ntR."),
        "xlsx": ("rows.csv", b"PK\x03\x04" + bytes(200)),
        "zip": ("rows.zip", b"PK\x03\x04"),
        "yaml": ("rows.yaml", b"!!python/object/apply:os.system ['id']"),
        "arrow": ("rows.arrow", b"ARROW1"),
        "utf16": ("rows.jsonl", jsonl.decode().encode("utf-16")),
        "lfs": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n"),
        "parquet-magic": ("rows.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    }
    lenient = {"csv-huge-field", "gz-name-up", "gz-trailing"}
    for number, (name, (file, content)) in enumerate(files.items()):
        for argv in (CHECK, TRAIN) if number % 3 == 0 else (CHECK,):
            yield _case(f"file-{name}-{argv[0]}", file, content, argv, "either" if name in lenient else "refused")
    for name, spoil in {"fifo": fifo("rows.jsonl"), "folder": made_folder("rows.jsonl")}.items():
        for argv in (CHECK, TRAIN, INFER_FILE):
            yield replace(_case(f"file-{name}-{argv[0]}", "rows.jsonl", b"x", argv, "refused"), spoil=spoil)
    names = {
        "escapes": "\x1b]0;evil\x07.jsonl",
        "spaces": "my rows.jsonl",
        "dash": "-rows.jsonl",
        "newline": "a\nb.jsonl",
        "not-utf8": "rows\udcc4.jsonl",
        "long": "r" * 200 + ".jsonl",
        "quote": "a'b\".jsonl",
        "bidi": "\u202erows.jsonl",
    }
    for name, file in names.items():
        for index, argv in enumerate((CHECK, TRAIN)):
            content = as_file([{"instruction": "a", "output": ""}], "jsonl")
            flags = tuple(f"--data={file}" if word == "rows.jsonl" and not index else word for word in argv)
            argv = tuple(word for word in flags if word != "--data") if not index else argv
            if name == "dash" and index:
                continue  # argparse takes it for a flag, as every command does
            yield _case(
                f"name-{name}-{argv[0]}", file, content, argv, "refused", tty=name in ("escapes", "bidi", "newline")
            )
    for index in range(40):
        yield Case(
            GROUP, f"mixed-{index}", _mixed, (_reading((CHECK, TRAIN)[index % 2], "rows.jsonl"),), "either", ("model",)
        )


def _mixed(place: Place) -> None:
    """Good rows, some of which got a random fault: a byte changed, a part cut out, a value of another type."""
    draw = place.draw
    lines = [json.dumps({**GOOD, "input": f"shop {number}"}).encode() for number in range(8)]
    for _ in range(draw.choice((1, 2, 5))):
        number = draw.randrange(len(lines))
        line = bytearray(lines[number])
        if not line:
            continue
        at = draw.randrange(len(line))
        how = draw.randrange(4)
        if how == 0:
            line[at] = draw.randrange(256)
        elif how == 1:
            del line[at : at + draw.randrange(1, 20)]
        elif how == 2:
            line[at:at] = draw.choice((b'"', b"{", b"\\u0000", b"\\ud800", b"\xff", b"\x1b]0;x\x07", b"<|im_end|>"))
        else:
            line = bytearray(json.dumps({**GOOD, draw.choice([*GOOD]): draw.choice(_VALUES[:12])}).encode())
        lines[number] = bytes(line)
    place.write("rows.jsonl", b"\n".join(lines) + b"\n")


# --- Rows that cost too much -----------------------------------------------------------------------------------------


def _long_line() -> bytes:
    """6 GB in one line, in a few MB."""
    block = gzip.compress(b"a" * (64 << 20), 9, mtime=0)
    return gzip.compress(b'{"instruction": "a", "output": "', mtime=0) + block * 96 + gzip.compress(b'"}\n', mtime=0)


def _many_lines() -> bytes:
    block = gzip.compress(b"\n" * (64 << 20), 9, mtime=0)
    return gzip.compress(json.dumps(GOOD).encode() + b"\n", mtime=0) + block * 48


def _wide_parquet() -> bytes:
    """20 million rows of one text."""
    import pyarrow
    import pyarrow.parquet

    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int8()), 20_000_000)
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["Bread."]))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": column, "output": column}), file)
    return file.getvalue()


def _turns(count: int) -> bytes:
    pairs = [{"role": ("user", "assistant")[n % 2], "content": f"word {n}"} for n in range(count)]
    return as_file([{"messages": pairs}], "jsonl")


_COSTLY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gz-6-gb-line": ("rows.jsonl.gz", _long_line),
    "gz-3-gb-blank-lines": ("rows.jsonl.gz", _many_lines),
    "gz-6-gb-list": ("rows.json.gz", lambda: gzip.compress(b"[", mtime=0) + _long_line()),
    "gz-6-gb-csv": ("rows.csv.gz", lambda: gzip.compress(b"instruction,output\na,", mtime=0) + _long_line()),
    "parquet-20-million": ("rows.parquet", _wide_parquet),
    "turns-2000": ("rows.jsonl", lambda: _turns(2000)),
    "turns-20000": ("rows.jsonl", lambda: _turns(20_000)),
    "keys-60000-twice": (
        "rows.jsonl",
        lambda: ("{" + ", ".join(f'"k{n}": 1' for n in range(60_000)) + ', "k0": 2}\n').encode(),
    ),
    "keys-60000": ("rows.jsonl", lambda: as_file([{**GOOD, **{f"k{n}": 1 for n in range(60_000)}}], "jsonl")),
    "csv-200000-columns": (
        "rows.csv",
        lambda: b",".join(b"c%d" % n for n in range(200_000)) + b"\n" + b"," * 199_999 + b"\n",
    ),
    "csv-200000-same-columns": ("rows.csv", lambda: b",".join([b"c"] * 200_000) + b"\n" + b"," * 199_999 + b"\n"),
    "rows-300000-bad": ("rows.jsonl", lambda: b'{"instruction": "a", "output": ""}\n' * 300_000),
    "open-brackets": ("rows.jsonl", lambda: b"[" * 20_000_000),
    "long-word": ("rows.jsonl", lambda: as_file([{**GOOD, "output": "x" * 20_000_000}], "jsonl")),
    "history-5000": ("rows.jsonl", lambda: as_file([{**GOOD, "history": [["a", "b"]] * 5000}], "jsonl")),
}


def _costly_cases() -> Iterator[Case]:
    for name, (file, content) in _COSTLY.items():
        few = name.startswith(("gz", "parquet"))
        for argv in (CHECK,) if few else (CHECK_TOKENS, TRAIN):
            yield _case(f"costly-{name}-{argv[0]}", file, content, argv, "either")


def data_cases() -> Iterator[Case]:
    """All of them."""
    yield from _kind_cases()
    yield from _broken_cases()
    yield from _file_cases()
    yield from _costly_cases()
