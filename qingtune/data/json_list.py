"""A JSON list read an object at a time, each with its line; files larger than the memory can be read."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

PIECE = 1 << 20  # bytes read at a time
SPACE = " \t\r\n"
ENDS = frozenset({*SPACE, ",", "]"})  # what may follow a number


class JsonListError(Exception):
    """The text is not a JSON list; says what is wrong, and on which line."""

    def __init__(self, what: str, line: int, *, too_large: bool = False) -> None:
        super().__init__(what)
        self.what, self.line, self.too_large = what, line, too_large


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; ValueError where a key comes twice, of which one value would be lost in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f'the key "{first_repeated([name for name, _ in pairs])}" comes twice')
    return values


def first_repeated(names: Sequence[str]) -> str | None:
    """The first name that comes a second time; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def json_list(file: io.BufferedIOBase, most: int) -> Iterator[tuple[Any, int, int]]:
    """Yield the items of a JSON list, each with the line on which it starts and its length in characters.

    Args:
        most: characters of an item.

    Raises:
        JsonListError: the text is no list, or broken, or an item is longer.
        UnicodeDecodeError: it is not UTF-8.
    """
    text = _Text(file, most)
    if text.next_character() != "[":
        raise JsonListError("a list of objects is wanted: [{...}, {...}]", 0)
    text.step()
    while text.next_character() != "]":
        line = text.line()
        value, length = text.value()
        yield value, line, length
        if text.next_character() == ",":
            text.step()
            if text.next_character() == "]":
                raise JsonListError('not valid JSON: an object is wanted after ","', text.line())
        elif text.next_character() != "]":
            raise JsonListError('not valid JSON: "," or "]" is wanted after an object', text.line())
    text.step()
    if text.next_character():
        raise JsonListError("not valid JSON: the list has ended, but more follows", text.line())


class _Text:
    """The text of a file through a window that moves on; `place` is where reading stands in it."""

    def __init__(self, file: io.BufferedIOBase, most: int) -> None:
        self._file, self._most = file, most
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=no_repeats)
        self._window, self._ended = "", False
        self._line, self._counted = 1, 0  # the line at a place up to which line ends are counted
        self.place = 0

    def line(self) -> int:
        """The line at the place, from 1."""
        self._line += self._window.count("\n", self._counted, self.place)
        self._counted = self.place
        return self._line

    def step(self) -> None:
        """Go past a character."""
        self.place += 1

    def next_character(self) -> str:
        """Go past white space; the character there, "" at the end of the file."""
        while True:
            while self.place < len(self._window) and self._window[self.place] in SPACE:
                self.place += 1
            if self.place < len(self._window):
                return self._window[self.place]
            if not self._more():
                return ""

    def value(self) -> tuple[Any, int]:
        """Read a value and go past it; with its length."""
        while True:
            try:
                value, end = self._json.raw_decode(self._window, self.place)
            except json.JSONDecodeError as error:
                # Where the window ends, what is wrong may be only that the rest is not read yet.
                cut_off = error.pos >= len(self._window) - len("-Infinity") or error.msg.startswith("Unterminated")
                if cut_off and len(self._window) - self.place > self._most:
                    raise JsonListError("an item is too large", self.line(), too_large=True) from None
                if cut_off and self._more():
                    continue
                line = self.line() + self._window.count("\n", self.place, error.pos)
                raise JsonListError(f"not valid JSON: {error.msg}", line) from None
            except RecursionError:
                raise JsonListError("not valid JSON: nested too deeply", self.line()) from None
            except ValueError as error:  # a repeated key, or a number of thousands of digits
                raise JsonListError(f"not valid JSON: {error}", self.line()) from None
            is_number = isinstance(value, int | float)
            if is_number and self._window[end : end + 1] not in ENDS and self._more():  # it may go on
                continue
            start, self.place = self.place, end
            if end - start > self._most:
                raise JsonListError("an item is too large", self.line(), too_large=True)
            return value, end - start

    def _more(self) -> bool:
        """Move the window on; False at the end of the file."""
        if self._ended:
            return False
        self.line()
        # As much again as is waiting, so that a long item is not decoded once for each piece of it.
        content = self._file.read(max(PIECE, len(self._window) - self.place))
        self._ended = not content
        self._window = self._window[self.place :] + self._bytes.decode(content, final=self._ended)
        self.place = self._counted = 0
        return True
