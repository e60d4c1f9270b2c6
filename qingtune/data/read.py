"""Files -> rows, each with its origin: JSONL, JSON, CSV and Parquet, plain or gzipped, in UTF-8 with or without BOM."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qingtune.data.parquet import RepeatedColumn, parquet_batches
from qingtune.data.rules import USUAL, Rules, first_repeated, size_in_words
from qingtune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN_PLACES = 5
PIECE = 1 << 20  # bytes read at a time where lines do not matter
MOST_LIST_BYTES = 256 << 20  # of a JSON list
_WRONG_ENCODING = (
    "not UTF-8 text; a file from Excel or an older Windows may be GBK: convert it, "
    "for example with `iconv -f GBK -t UTF-8`"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file; `origin` is `file:line` (Parquet: `file:row`), `size` its bytes in the file."""

    values: dict[str, Any]
    origin: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """A place in the data that cannot be used, and why.

    Attributes:
        kind: of data, where that is not supported; then `sign` is what it was recognised by.
    """

    origin: str
    reason: str
    kind: str = ""
    sign: str = ""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass
class Places:
    """How many rows something was seen in, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.first) < SHOWN_PLACES:
            self.first.append(place)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; ValueError where a key comes twice, of which one value would be lost silently."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f'the key "{first_repeated([name for name, _ in pairs])}" comes twice')
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_no_repeats)
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: str, rules: Rules = USUAL) -> Iterator[Row | Fault]:
    """Yield the rows of a file in order, a Fault in place of each that cannot be read.

    No more than a row, or a few of Parquet, is in memory at a time; of a JSON list, the text of the file as well.

    Raises:
        UserError: the file cannot be opened, is of an unknown kind, is broken as a whole, or holds a row that is
            larger than the rules allow and cannot be passed over.
    """
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, rules)
        else:
            with _open_bytes(path) as file:
                start = file.read(4)
                if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError("UTF-16 text", where=path, fix="Save the file as UTF-8.")
                file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
                reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[kind]
                yield from reader(file, path, rules)
    except FileNotFoundError:
        raise UserError("there is no such file", where=path, fix="Check the path.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"the gzip file is broken ({error})", where=path, fix="Create or download it again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from None


def _kind(path: str) -> str:
    name = path.lower().removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise UserError(
        "this file type is not supported",
        where=path,
        fix=f"Data files end in {', '.join(SUFFIXES)}, each also with .gz.",
    )


def _open_bytes(path: str) -> io.BufferedIOBase:
    if path.lower().endswith(".gz"):
        return io.BufferedReader(cast("Any", gzip.open(path, "rb")), PIECE)  # reads a line several times faster
    return Path(path).open("rb")


def _too_large(rules: Rules) -> str:
    return f"a row over {rules.max_row_mb:g} MB; raise max_row_mb if this is intended"


def _check_blank(size: int, path: str, line: int, rules: Rules) -> None:
    """Refuse more bytes of blank lines between two rows than a row may have."""
    if size > rules.row_bytes:
        raise UserError(
            f"over {rules.max_row_mb:g} MB of blank lines", where=f"{path}:{line}", fix="Remove them from the file."
        )


def _read_jsonl(file: io.BufferedIOBase, path: str, rules: Rules) -> Iterator[Row | Fault]:
    number = blank = 0
    while line := file.readline(rules.row_bytes + 1):
        number += 1
        if len(line) > rules.row_bytes:
            while line and not line.endswith(b"\n"):
                line = file.readline(PIECE)
            yield Fault(f"{path}:{number}", _too_large(rules))
        elif line.strip():
            blank = 0
            yield _row_of_line(line, f"{path}:{number}")
        else:
            blank += len(line)
            _check_blank(blank, path, number, rules)


def _row_of_line(line: bytes, origin: str) -> Row | Fault:
    try:
        text = line.decode("utf-8").rstrip(
            "\r\n"
        )  # with its end, what is missing there would be at column 1 of the next
        return _row(_JSON.decode(text), origin, len(line))
    except UnicodeDecodeError:
        return Fault(origin, _WRONG_ENCODING)
    except (ValueError, RecursionError) as error:
        return Fault(origin, _why_not_json(error))


def _why_not_json(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON; a repeated key and a number of thousands of digits are plain ValueErrors."""
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    place = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
    return f"not valid JSON: {place}"


def _read_json(file: io.BufferedIOBase, path: str, rules: Rules) -> Iterator[Row | Fault]:
    """A list of objects; each row's origin is the line on which it starts."""
    try:
        text = _whole_text(file, path, rules)
    except UnicodeDecodeError:
        raise _not_utf8(file, path) from None
    line, counted, place = 1, 0, _past_space(text, 0)
    if text[place : place + 1] != "[":
        raise UserError(
            "expected a list of objects: [{...}, {...}]",
            where=path,
            fix="A file with one object per line is .jsonl, not .json.",
        )
    place = _past_space(text, place + 1)
    ended = text[place : place + 1] == "]"
    while not ended:
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = _JSON.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise _broken_list(error.msg, text, path, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise UserError(_why_not_json(error), where=f"{path}:{line}") from None
        if end - place > rules.row_bytes:
            raise UserError(_too_large(rules), where=f"{path}:{line}")
        yield _row(value, f"{path}:{line}", end - place)
        place = _past_space(text, end)
        mark = text[place : place + 1]
        if mark not in (",", "]"):
            raise _broken_list('"," or "]" expected after an object', text, path, place)
        ended = mark == "]"
        place = place if ended else _past_space(text, place + 1)
    if (more := _past_space(text, place + 1)) < len(text):
        raise _broken_list("text follows the end of the list", text, path, more)


def _whole_text(file: io.BufferedIOBase, path: str, rules: Rules) -> str:
    """The rest of a file that is held in memory as a whole, which takes up to five times its size."""
    most = min(MOST_LIST_BYTES, rules.data_bytes() // 4)
    content = file.read(most + 1)
    if len(content) > most:
        or_more = "; or raise max_data_gb." if most < MOST_LIST_BYTES else "."
        raise UserError(
            f"over {size_in_words(most)}, and a JSON list is held in memory as a whole",
            where=path,
            fix=f"Convert it to .jsonl, which has no such limit, for example with `jq -c '.[]'`{or_more}",
        )
    return content.decode("utf-8")


def _past_space(text: str, place: int) -> int:
    """The next place that holds no white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _broken_list(what: str, text: str, path: str, place: int) -> UserError:
    return UserError(f"not valid JSON: {what}", where=f"{path}:{text.count(chr(10), 0, place) + 1}")


class _Lines:
    """The lines of a text, of which a record may take several, but only a limited number of characters in all."""

    def __init__(self, text: io.TextIOWrapper, most: int) -> None:
        self._text, self._most = text, most
        self.taken = 0
        self.too_large = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._most + 1)
        self.taken += len(line)
        self.too_large = self.taken > self._most
        if not line or self.too_large:
            raise StopIteration
        return line


def _separator(file: io.BufferedIOBase, rules: Rules) -> str:
    """The separator of the columns' names: where the comma is a decimal point, spreadsheets write semicolons."""
    start = file.tell()
    names = file.readline(rules.row_bytes)
    file.seek(start)
    return next((mark for mark in ",;\t" if mark.encode() in names), ",")


def _read_csv(file: io.BufferedIOBase, path: str, rules: Rules) -> Iterator[Row | Fault]:
    csv.field_size_limit(2**31 - 1)  # records are bounded as a whole
    separator = _separator(file, rules)
    text = io.TextIOWrapper(cast("Any", file), encoding="utf-8", newline="")
    lines, blank = _Lines(text, rules.row_bytes), 0
    reader = csv.reader(lines, strict=True, delimiter=separator)
    start = 1
    try:
        names = next(reader, [])
        if repeated := first_repeated(names):
            raise UserError(f'the header has the column "{repeated}" twice', where=f"{path}:1")
        lines.taken, start = 0, reader.line_num + 1
        for cells in reader:
            line, start, size, lines.taken = start, reader.line_num + 1, lines.taken, 0
            blank = 0 if cells else blank + size
            _check_blank(blank, path, line, rules)
            if not cells:
                continue
            origin = f"{path}:{line}"
            if len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), origin, size)
            else:
                yield Fault(origin, f"{len(cells)} cells, but the header has {len(names)} columns")
        if lines.too_large:
            raise UserError(_too_large(rules), where=f"{path}:{start}")
    except csv.Error as error:
        what = _too_large(rules) if lines.too_large else f"not valid CSV: {error}"
        raise UserError(what, where=f"{path}:{start}") from None
    except UnicodeDecodeError:
        raise _not_utf8(file, path) from None
    finally:
        text.detach()


def _read_parquet(path: str, rules: Rules) -> Iterator[Row | Fault]:
    import pyarrow

    number = 0
    try:
        with _unpacked(path, rules) as source:
            for batch in parquet_batches(source):
                for row in batch.rows(rules.row_bytes):
                    number += 1
                    origin = f"{path}:{number}"
                    yield Fault(origin, _too_large(rules)) if row is None else Row(row, origin, batch.row_size)
    except RepeatedColumn as error:
        raise UserError(f'two columns have the name "{error}"', where=path) from None
    except MemoryError:
        raise UserError(
            "a part of this file needs more memory than is available", where=f"{path}:{number + 1}"
        ) from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"not a valid Parquet file: {error}", where=path) from None


@contextmanager
def _unpacked(path: str, rules: Rules) -> Generator[Any]:
    """The file to read from: itself or, if it is gzipped, what it holds, on the disk and not in memory."""
    if not path.lower().endswith(".gz"):
        yield path
        return
    with gzip.open(path, "rb") as file, tempfile.TemporaryFile() as unpacked:
        most = rules.data_bytes()
        while piece := file.read(PIECE):
            unpacked.write(piece)
            if unpacked.tell() > most:
                raise UserError(
                    f"over {size_in_words(most)} when unpacked", where=path, fix="Unpack it, or raise max_data_gb."
                )
        unpacked.seek(0)
        yield unpacked


def _not_utf8(file: io.BufferedIOBase, path: str) -> UserError:
    """The error that names the first line which is not UTF-8."""
    file.seek(0)
    number, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    while piece := file.readline(PIECE):
        try:
            decoder.decode(piece)
        except UnicodeDecodeError:
            return UserError(_WRONG_ENCODING, where=f"{path}:{number}")
        number += piece.endswith(b"\n")
    return UserError(_WRONG_ENCODING, where=f"{path}:{number}")


def _row(value: object, origin: str, size: int) -> Row | Fault:
    if isinstance(value, dict):
        return Row(cast("dict[str, Any]", value), origin, size)
    return Fault(origin, f"expected a JSON object, not {_kind_of_json(value)}")


def _kind_of_json(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
