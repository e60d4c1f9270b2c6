"""The form that a row asks of its answer, as rules in the data: `"form": {"title": true, "tags": 3}`.

A row without rules is not judged; nothing is guessed from its prompt or its reference.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from pydantic import Field, ValidationError

from qingtune.config import Settings
from qingtune.errors import UserError
from qingtune.values import Integer

COLUMN = "form"
TITLE_COLUMNS = 80  # a title's width at most, a Chinese character counting 2

_EMOJI = re.compile("[\u231a-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
_TAG = re.compile(r"(?<![\w#])#(?=[^\s#]*\w)[^\s#]+")


class Form(Settings):
    """The rules of a row; those it does not give are not asked.

    Attributes:
        title: true: the first line is a title. It is not empty, at most 80 columns wide (40 Chinese characters), is
            not made of hashtags alone, and more lines follow.
        emoji: true: at least one emoji; false: none.
        tags: so many hashtags at least, such as `#bakery`; `# A heading` is none.
        min_characters: so many characters at least, white space not counted; likewise max_characters, at most.
        contains: each of these texts stands in the answer, as it is written.
        excludes: none of these texts does.
    """

    title: bool | None = None
    emoji: bool | None = None
    tags: Integer | None = Field(None, ge=0)
    min_characters: Integer | None = Field(None, ge=0)
    max_characters: Integer | None = Field(None, ge=0)
    contains: list[str] | None = None
    excludes: list[str] | None = None


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
    """The hashtags of a text."""
    return _TAG.findall(text)


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
