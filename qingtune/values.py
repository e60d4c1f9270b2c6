"""Kinds of values that settings take, with what is understood besides the plain form."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, WithJsonSchema


def _number_not_bool(value: object) -> object:
    """Refuse true and false where a number is asked for: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def whole_number(value: object) -> object:
    """Let a flag's text "4" pass for the number 4 where the choices are numbers."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else _number_not_bool(value)


def _split_commas(value: object) -> object:
    """Let "a,b" and ["a", "b"] mean the same; an empty text means nothing given."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return None if value in ("", []) else value


def _no_if_false(value: object) -> object:
    """YAML-minded files write `no` as false; TrainingArguments calls it "no"."""
    return "no" if value is False else value


def auto_or_switch(value: object) -> object:
    """resume_from_checkpoint is a switch, a word or a path; a flag's "true" is the switch, and null the default."""
    return {"true": True, "false": False, "None": "auto"}.get(str(value), value)


def _split_numbers(value: object) -> object:
    """Let "0-3,7", 7 and [0, 1, 2, 3, 7] be lists of numbers; nothing given is null."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return None if value == [] else value
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        if not (ends := re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)):
            raise ValueError("numbers and ranges are wanted, such as 0-3,7")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise ValueError(f"{part} ends before it begins")
        numbers += range(first, last + 1)
    return numbers or None


def _pattern(value: object) -> object:
    """Let q_proj=8,v_proj=16 and {"q_proj": 8, "v_proj": 16} mean the same; keys are to be regular expressions."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = json.loads(value)
    elif isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {key.strip(): number.strip() for key, _, number in pairs}
    for key in cast("dict[str, object]", value) if isinstance(value, dict) else ():
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{key!r} is no name and no regular expression: {error}") from None
    return value or None


def _owner_and_name(value: object) -> object:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(value)):
        raise ValueError("should be OWNER/NAME, such as me/my-shop")
    return value


def _start(value: object) -> object:
    """PEFT calls the default start true."""
    return "default" if value is True or str(value).lower() == "true" else value


Integer = Annotated[int, BeforeValidator(_number_not_bool)]
Number = Annotated[float, BeforeValidator(_number_not_bool)]
_TEXT_OR_LIST = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
)


def _any_of(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*kinds, {"type": "string"}, {"type": "null"}]})


CommaList = Annotated[list[str] | None, BeforeValidator(_split_commas), _TEXT_OR_LIST]
Quantizations = Annotated[list[Literal["f32", "f16", "bf16", "q8_0", "q4_0"]], BeforeValidator(_split_commas)]
RepositoryName = Annotated[str, BeforeValidator(_owner_and_name)]
Numbers = Annotated[
    list[NonNegativeInt] | None,
    BeforeValidator(_split_numbers),
    _any_of({"type": "integer"}, {"type": "array", "items": {"type": "integer"}}),
]
_Rank = Annotated[PositiveInt, BeforeValidator(_number_not_bool)]
_Alpha = Annotated[PositiveFloat, BeforeValidator(_number_not_bool)]
RankPattern = Annotated[
    dict[str, _Rank] | None,
    BeforeValidator(_pattern),
    _any_of({"type": "object", "additionalProperties": {"type": "integer"}}),
]
AlphaPattern = Annotated[
    dict[str, _Alpha] | None,
    BeforeValidator(_pattern),
    _any_of({"type": "object", "additionalProperties": {"type": "number"}}),
]
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_no_if_false)]
Start = Annotated[Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora"], BeforeValidator(_start)]
