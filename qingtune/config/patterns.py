"""Regular expressions of strangers, matched in a time that grows with the text and not faster.

Python's `re` tries one way through an expression after the other, and a short one can take it years. Rust's `regex`,
which pydantic includes, follows all ways at once (https://docs.rs/regex/latest/regex/#untrusted-input). It knows no
look-around and no references back; an expression that it would not read as Python does is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from qingtune.errors import reason_of

MOST_CHARACTERS = 300  # of an expression
_MOST_PARTS = 2000  # of an expression, times all its counted repetitions: as many as they may be written out
_COUNT = r"\{(?:\d+(?:,\d*)?|,\d*)\}"
_TOKEN = re.compile(
    rf"""
      (?P<anchor> \^ | \$ | \\[AZ] )
    | (?P<group> \( (?: \?: | \?P<[A-Za-z_]\w*> | (?!\?) ) )
    | \[ (?P<characters> \^? \]? (?: \\. | (?!--) [^\]\\] )* ) \]
    | (?P<times> (?: [*+?] | {_COUNT} ) \?? ) (?! [*+?] )
    | (?P<kind> \\[dDwWsS] )
    | (?P<same> [.|)] )
    | (?P<character> \\[^A-Za-z0-9] | (?! {_COUNT} ) [^\\\[(*+?] )
    """,
    re.VERBOSE | re.DOTALL,
)


class PatternError(ValueError):
    """An expression that is invalid or not supported here, with the reason."""


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Callable[[str], bool]:
    """Whether a name is what an expression describes, or ends with it at a dot: a function of the name.

    Raises:
        PatternError: the expression is invalid, too long, or not supported.
    """
    if len(text) > MOST_CHARACTERS:
        raise PatternError(f"it has {len(text):,} characters; the limit is {MOST_CHARACTERS}")
    parts: list[str] = []
    place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if not token:
            raise PatternError(
                f"{text[place : place + 4]!r} at position {place} is not understood; names, dots, classes such as "
                "[0-9] and \\d, groups, |, *, +, ? and {m,n} are"
            )
        parts.append(_in_rust(token))
        place = token.end()
    if len(parts) * math.prod(max(1, int(most)) for most in re.findall(r"(\d+),?\}", text)) > _MOST_PARTS:
        raise PatternError("it has too many repetitions")
    try:
        re.compile(text)  # which is particular about what is repeated and how parentheses are placed
        return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:.*\.)?(?:{''.join(parts)})\z")).isinstance_python
    except (re.error, RecursionError, SchemaError) as error:
        raise PatternError(reason_of(error)) from None


def _in_rust(token: re.Match[str]) -> str:
    """A part of an expression as Rust writes it; kinds of characters are of ASCII: those of Unicode take megabytes."""
    text = token[0]
    match token.lastgroup:
        case "anchor":
            return r"\A" if text in ("^", r"\A") else r"\z"
        case "group":
            return "(?:"
        case "kind":
            return f"[{_ascii(text)}]"
        case "characters":  # in which Rust knows classes within classes and operations on them
            inner = re.sub(r"\\.|[\[&~]", lambda found: _ascii(found[0]), token["characters"])
            return f"[{inner}]"
        case "times":
            return text.replace("{,", "{0,")
        case "character":
            return rf"\x{{{ord(text[-1]):x}}}"
        case _:
            return text


def _ascii(text: str) -> str:
    """A kind of characters, an escape, or a character that means something to Rust alone, as it is within a class."""
    kind = {"d": "digit", "w": "word", "s": "space"}.get(text[1:].lower())
    return f"[:{'^' * text[1].isupper()}{kind}:]" if kind else text.rjust(2, "\\")
