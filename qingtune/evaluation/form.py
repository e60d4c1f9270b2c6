"""The form that a row asks of its answer, as rules in the data: `"form": {"title": true, "tags": 3}`.

A row without rules is not judged; nothing is guessed from its prompt or its reference.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

import regex
from pydantic import Field, ValidationError

from qingtune.config.training import Settings
from qingtune.config.types import Integer
from qingtune.errors import UserError

COLUMN = "form"
TITLE_COLUMNS = 80  # a title's width at most, a Chinese character counting 2

# Emoji that are drawn as pictures by themselves, and the pictographs that a phone draws so, such as ❤ and ✈. Not text
# symbols: ★, ❶ and ✓; ©, ™, → and digits only where a variation selector or a keycap follows.
_EMOJI = regex.compile(
    r"[\p{Emoji_Presentation}\uFE0F\u20E3[\p{Emoji}&&[\p{InMiscellaneous_Symbols}\p{InDingbats}"
    r"\p{InMiscellaneous_Symbols_and_Pictographs}\p{InTransport_and_Map_Symbols}"
    r"\p{InEnclosed_Ideographic_Supplement}]]]",
    regex.V1,
)
# A tag, with the # that closes it on Weibo; or a run of # that begins none, as of a heading or of C#.
_TAG = re.compile(r"(?<![A-Za-z0-9_&/])([#＃](?=[^\s#＃]*[^\W\d_])[^\s#＃]+)[#＃]?|[#＃]+")
_SomeText = Annotated[str, Field(min_length=1)]


class Form(Settings):
    """The rules of a row; those it does not give are not asked.

    Attributes:
        title: true: the first line is a title. It is not empty, at most 80 columns wide (40 Chinese characters), is
            not made of hashtags alone, and more lines follow.
        emoji: true: at least one emoji, be it a flag or a keycap; false: none. ©, digits and signs such as ★ are none.
        tags: least number of hashtags, such as `#bakery`, `#面包#` or `#面包[话题]#`. A # begins one at the start of
            a word or after a Chinese character, and a letter has to be in it: `# A heading`, `C#` and `#1` are none.
        min_characters: the least number of characters, without white space; max_characters: the most.
        contains: each of these texts is in the answer, verbatim.
        excludes: none of these texts does.
    """

    title: bool | None = None
    emoji: bool | None = None
    tags: Integer | None = Field(None, ge=0)
    min_characters: Integer | None = Field(None, ge=0)
    max_characters: Integer | None = Field(None, ge=0)
    contains: list[_SomeText] | None = None
    excludes: list[_SomeText] | None = None


def form_of(values: dict[str, Any], origin: str) -> Form | None:
    """A row's rules; None if it gives none.

    Args:
        values: the row; CSV files hold the rules as JSON text.
        origin: of the row, for the message.

    Raises:
        UserError: the rules are not what they should be.
    """
    given = values.get(COLUMN)
    if given is None or given == "":
        return None
    try:
        form = Form.model_validate(json.loads(given) if isinstance(given, str) else given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (COLUMN, *first["loc"]))
        known = ", ".join(Form.model_fields)
        raise UserError(f'"{place}": {first["msg"]}', where=origin, fix=f"The rules are {known}.") from None
    except ValueError as error:
        raise UserError(f'"{COLUMN}" is not JSON: {error}', where=origin) from None
    return form if form.model_dump(exclude_none=True) else None


def kept_rules(form: Form, answer: str) -> dict[str, bool]:
    """Each rule that is given, and whether the answer keeps it."""
    answer = answer.strip()
    return {name: rule(answer, getattr(form, name)) for name, rule in _RULES.items() if getattr(form, name) is not None}


def tags_in(text: str) -> list[str]:
    """The hashtags of a text, without the # that closes them."""
    return [tag for tag in _TAG.findall(text) if tag]


def has_title(text: str) -> bool:
    """Whether the first line can be taken for a title."""
    first, _, rest = text.strip().partition("\n")
    width = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in first)
    return bool(_TAG.sub("", first).strip()) and width <= TITLE_COLUMNS and bool(rest.strip())


def _characters(text: str) -> int:
    return len("".join(text.split()))


_RULES: dict[str, Callable[[str, Any], bool]] = {
    "title": lambda text, wanted: has_title(text) == wanted,
    "emoji": lambda text, wanted: bool(_EMOJI.search(text)) == wanted,
    "tags": lambda text, fewest: len(tags_in(text)) >= fewest,
    "min_characters": lambda text, fewest: _characters(text) >= fewest,
    "max_characters": lambda text, most: _characters(text) <= most,
    "contains": lambda text, wanted: all(one in text for one in wanted),
    "excludes": lambda text, unwanted: not any(one in text for one in unwanted),
}
