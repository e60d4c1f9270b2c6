"""Files -> rows, each with its origin: JSONL, JSON, CSV and Parquet, plain or gzipped, in UTF-8 with or without BOM."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qingtune.data.json_list import JsonListError, json_list, no_repeats
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
            yield _row(json.loads(line.decode("utf-8"), object_pairs_hook=no_repeats), origin)
        except UnicodeDecodeError:
            yield Fault(origin, _WRONG_ENCODING)
        except json.JSONDecodeError as error:
            yield Fault(origin, f"not valid JSON: {error.msg} (column {error.colno})")
        except ValueError as error:  # a repeated key, or a number of thousands of digits
            yield Fault(origin, f"not valid JSON: {error}")
        except RecursionError:
            yield Fault(origin, "not valid JSON: nested too deeply")


def _read_json(file: io.BufferedIOBase, path: str) -> Iterator[Row | Fault]:
    """A list of objects; each row's origin is the line on which it starts."""
    try:
        for value, line in json_list(file):
            yield _row(value, f"{path}:{line}")
    except UnicodeDecodeError:
        raise _not_utf8(file, path) from None
    except JsonListError as error:
        where = f"{path}:{error.line}" if error.line else path
        fix = None if error.line else "One object a line is .jsonl, not .json."
        raise UserError(error.what, where=where, fix=fix) from None


def _read_csv(file: io.BufferedIOBase, path: str) -> Iterator[Row | Fault]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(cast("Any", file), encoding="utf-8", newline="")
    reader = csv.reader(text, strict=True)
    start = 1
    try:
        names = next(reader, [])
        start = reader.line_num + 1
        if repeated := _first_repeated(names):
            raise UserError(f'the first line names the column "{repeated}" twice', where=f"{path}:1")
        for cells in reader:
            origin, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), origin)
            else:
                yield Fault(origin, f"{len(cells)} cells, but the first line names {len(names)} columns")
    except csv.Error as error:
        raise UserError(f"not valid CSV: {error}", where=f"{path}:{start}") from None
    except UnicodeDecodeError:
        raise _not_utf8(file, path) from None
    finally:
        text.detach()


def _read_parquet(path: str) -> Iterator[Row | Fault]:
    import pyarrow
    import pyarrow.parquet

    source: Any = path
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            source = io.BytesIO(file.read())
    try:
        number = 0
        file = pyarrow.parquet.ParquetFile(source)
        if repeated := _first_repeated(file.schema_arrow.names):
            raise UserError(f'two columns are named "{repeated}"', where=path)
        for batch in file.iter_batches():
            columns = [
                column.cast(pyarrow.string()) if pyarrow.types.is_temporal(column.type) else column
                for column in batch.columns  # Python's dates are fewer than Parquet's
            ]
            for values in pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist():
                number += 1
                yield Row(values, f"{path}:{number}")
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"not a valid Parquet file: {error}", where=path) from None


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _not_utf8(file: io.BufferedIOBase, path: str) -> UserError:
    """The error that names the first line which is not UTF-8."""
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return UserError(_WRONG_ENCODING, where=f"{path}:{number}")
    return UserError(_WRONG_ENCODING, where=path)


def _row(value: object, origin: str) -> Row | Fault:
    if isinstance(value, dict):
        return Row(cast("dict[str, Any]", value), origin)
    return Fault(origin, f"a JSON object is wanted, not {_kind_of_json(value)}")


def _kind_of_json(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
