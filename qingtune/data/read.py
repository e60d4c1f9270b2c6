"""Files -> rows, each with its origin: JSONL, JSON, CSV and Parquet, plain or gzipped, in UTF-8 with or without BOM."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qingtune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_WRONG_ENCODING = (
    "not UTF-8 text; a file from Excel or an older Windows may be GBK: convert it, "
    "for example with `iconv -f GBK -t UTF-8`"
)


@dataclass(frozen=True)
class Row:
    """One record of a data file; `origin` is `file:line` (Parquet: `file:row`)."""

    values: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Fault:
    """A place in the data that cannot be used, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def read_rows(path: str) -> Iterator[Row | Fault]:
    """Yield the rows of a file in order, a Fault in place of each that cannot be read.

    Raises:
        UserError: the file cannot be opened, is of an unknown kind, or is broken as a whole.
    """
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
        else:
            with _open_bytes(path) as file:
                start = file.read(4)
                if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError("UTF-16 text", where=path, fix="Save the file as UTF-8.")
                file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
                reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[kind]
                yield from reader(file, path)
    except FileNotFoundError:
        raise UserError("there is no such file", where=path, fix="Check the path of the data.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"the gzip file is broken ({error})", where=path, fix="Make or fetch it again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from None


def _kind(path: str) -> str:
    name = path.lower().removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise UserError(
        "this kind of file is not known",
        where=path,
        fix=f"Data files end in {', '.join(SUFFIXES)}, each also with .gz.",
    )


def _open_bytes(path: str) -> io.BufferedIOBase:
    if path.lower().endswith(".gz"):
        return cast("io.BufferedIOBase", gzip.open(path, "rb"))
    return Path(path).open("rb")


def _read_jsonl(file: io.BufferedIOBase, path: str) -> Iterator[Row | Fault]:
    for number, line in enumerate(file, start=1):
        origin = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield _row(json.loads(line.decode("utf-8")), origin)
        except UnicodeDecodeError:
            yield Fault(origin, _WRONG_ENCODING)
        except json.JSONDecodeError as error:
            yield Fault(origin, f"not valid JSON: {error.msg} (column {error.colno})")
        except ValueError as error:  # a number of thousands of digits
            yield Fault(origin, f"not valid JSON: {error}")
        except RecursionError:
            yield Fault(origin, "not valid JSON: nested too deeply")


def _read_json(file: io.BufferedIOBase, path: str) -> Iterator[Row | Fault]:
    """A list of objects; each row's origin is the line on which it starts."""
    text = _decode(file.read(), path)
    decoder = json.JSONDecoder()
    place = _skip_space(text, 0)
    if not text.startswith("[", place):
        raise UserError(
            "a list of objects is wanted: [{...}, {...}]", where=path, fix="One object a line is .jsonl, not .json."
        )
    place = _skip_space(text, place + 1)
    line, counted = 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(f"not valid JSON: {what}", where=f"{path}:{line}") from None
        yield _row(value, f"{path}:{line}")
        place = _skip_space(text, place)
        if text.startswith(",", place):
            place = _skip_space(text, place + 1)
            if text.startswith("]", place):
                line += text.count("\n", counted, place)
                raise UserError('not valid JSON: an object is wanted after ","', where=f"{path}:{line}")
        elif not text.startswith("]", place):
            line += text.count("\n", counted, place)
            raise UserError('not valid JSON: "," or "]" is wanted after an object', where=f"{path}:{line}")
    rest = _skip_space(text, place + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise UserError("not valid JSON: the list has ended, but more follows", where=f"{path}:{line}")


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _read_csv(file: io.BufferedIOBase, path: str) -> Iterator[Row | Fault]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decode(file.read(), path), newline=""), strict=True)
    try:
        names = next(reader, [])
        start = reader.line_num + 1
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f'the first line names the column "{repeated[0]}" twice', where=f"{path}:1")
        for cells in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), origin)
            else:
                yield Fault(origin, f"{len(cells)} cells, but the first line names {len(names)} columns")
    except csv.Error as error:
        raise UserError(f"not valid CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _read_parquet(path: str) -> Iterator[Row | Fault]:
    import pyarrow
    import pyarrow.parquet

    source: Any = path
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            source = io.BytesIO(file.read())
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path}:{number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"not a valid Parquet file: {error}", where=path) from None


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(_WRONG_ENCODING, where=f"{path}:{line}") from None


def _row(value: object, origin: str) -> Row | Fault:
    if isinstance(value, dict):
        return Row(cast("dict[str, Any]", value), origin)
    return Fault(origin, f"a JSON object is wanted, not {_kind_of_json(value)}")


def _kind_of_json(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
