"""Types of values of settings, and the other forms in which they may be written."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, WithJsonSchema

from qingtune.config.methods import TrainingMethod
from qingtune.config.patterns import PatternError, parse_pattern

# Of sampling, in flags and in a model's own settings. Below the least temperature, logits divided by it could leave
# fp32, and the likeliest token has all of the share long before: it is taken, as with 0.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-4, 1e4
LEAST_PENALTY, MOST_PENALTY = 1e-2, 1e2


def _characters(value: object) -> object:
    """Refuse halves of surrogate pairs, which Python makes of an argument's bytes that are not UTF-8."""
    try:
        return value.encode().decode() if isinstance(value, str) else value
    except UnicodeEncodeError:
        raise ValueError("not UTF-8 text") from None


def _number_not_bool(value: object) -> object:
    """Refuse true and false for a number: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def whole_number(value: object) -> object:
    """Read a flag's text "4" as the number 4, for settings with numbers as choices."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else _number_not_bool(value)


def _split_commas(value: object) -> object:
    """Read "a,b" as ["a", "b"], and an empty text as null."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return None if value in ("", []) else value


def _split_lower_case(value: object) -> object:
    """Read "Q4_K_M,f16" as ["q4_k_m", "f16"]: types of GGUF are written both ways."""
    return _split_commas(value.lower() if isinstance(value, str) else value)


def _no_if_false(value: object) -> object:
    """YAML-minded files write `no` as false; TrainingArguments calls it "no"."""
    return "no" if value is False else value


def auto_or_switch(value: object) -> object:
    """Read a flag's "true" and "false" as the switch, and null as the default, for settings that may also be text."""
    return {"true": True, "false": False, "None": "auto"}.get(str(value), value)


def _split_numbers(value: object) -> object:
    """Read "0-3,7" as [0, 1, 2, 3, 7], a number as a list of it, and an empty list or text as null."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return None if value == [] else value
    numbers: list[int] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        if not (ends := re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)):
            raise ValueError("expected numbers and ranges, such as 0-3,7")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise ValueError(f"{part} ends before it begins")
        numbers += range(first, last + 1)
    return numbers or None


def _pattern(value: object) -> object:
    """Read q_proj=8,v_proj=16 as {"q_proj": 8, "v_proj": 16}; keys must be regular expressions."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = json.loads(value)
    elif isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {key.strip(): number.strip() for key, _, number in pairs}
    for key in cast("dict[str, object]", value) if isinstance(value, dict) else ():
        try:
            parse_pattern(key)
        except PatternError as error:
            raise ValueError(f"{key!r} is neither a name nor a supported regular expression: {error}") from None
    return value or None


def _owner_and_name(value: object) -> object:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(value)):
        raise ValueError("should be OWNER/NAME, such as me/my-shop")
    return value


def _start(value: object) -> object:
    """Read true as PEFT does: the default."""
    return "default" if value is True or str(value).lower() == "true" else value


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high, both included; evenly spread, with log by their logarithm.

    Attributes:
        whole: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


def _interval(text: str) -> Interval:
    """Read "8..64" as whole numbers and "1e-5..1e-3:log" as numbers spread by their logarithm."""
    ends = re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})(:log)?", text.strip())
    if not ends:
        raise ValueError(f"{text} is not LOW..HIGH, such as 1e-5..1e-3:log or 8..64")
    low, high = float(ends[1]), float(ends[2])
    if not math.isfinite(high - low):
        raise ValueError(f"{text} has no end")
    if low >= high:
        raise ValueError(f"{text} ends before it begins")
    if ends[3] and low <= 0:
        raise ValueError(f"{text}: with :log both ends must be above 0")
    return Interval(low, high, bool(ends[3]), all(re.fullmatch(r"[+-]?\d+", end) for end in ends.groups()[:2]))


_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"


def _settings_of_words(value: object) -> object:
    """Read the words "a=1,2 b=3" as {"a": "1,2", "b": "3"}."""
    if not isinstance(value, str):
        return value or None
    pairs = [word.partition("=") for word in value.split()]
    if wrong := [name for name, equals, text in pairs if not (name and equals and text)]:
        raise ValueError(f"{wrong[0]} is not NAME=VALUE")
    names = [name.replace("-", "_") for name, _, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is given twice")
    return dict(zip(names, (text for _, _, text in pairs), strict=True)) or None


def _values(name: str, value: object) -> object:
    """Read "8,16" and "q_proj,v_proj;all" as lists, and a single value as a list of it."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(";" if ";" in value else ",") if part.strip()]
    if value == []:
        raise ValueError(f"{name} has no value")
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _values_of_each(value: object, *, intervals: bool = False) -> object:
    value = _settings_of_words(value)
    if not isinstance(value, dict):
        return value
    return {
        name: _interval(values) if intervals and isinstance(values, str) and ".." in values else _values(name, values)
        for name, values in cast("dict[str, object]", value).items()
    }


def _settings_of_methods(value: object) -> object:
    """Read full.learning_rate=1e-5 as {"full": {"learning_rate": 1e-5}}."""
    if not isinstance(value, str):
        return value or None
    settings: dict[str, dict[str, object]] = {}
    for name, text in cast("dict[str, object]", _settings_of_words(value) or {}).items():
        method, dot, setting = name.partition(".")
        if not (method and dot and setting):
            raise ValueError(f"{name} is not METHOD.SETTING, such as full.learning_rate")
        settings.setdefault(method, {})[setting] = text
    return settings or None


def _no_repeats(values: list[Any]) -> list[Any]:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{repeated[0]} is given twice")
    return values


Text = Annotated[str, BeforeValidator(_characters)]
Integer = Annotated[int, BeforeValidator(_number_not_bool)]
Number = Annotated[float, BeforeValidator(_number_not_bool)]


def _any_of(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*kinds, {"type": "string"}, {"type": "null"}]})


CommaList = Annotated[
    list[str] | None, BeforeValidator(_split_commas), _any_of({"type": "array", "items": {"type": "string"}})
]
Quantization = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m"]
Quantizations = Annotated[list[Quantization], BeforeValidator(_split_lower_case)]
RepositoryName = Annotated[str, BeforeValidator(_owner_and_name)]
Numbers = Annotated[
    list[NonNegativeInt] | None,
    BeforeValidator(_split_numbers),
    _any_of({"type": "integer"}, {"type": "array", "items": {"type": "integer"}}),
]
RankPattern = Annotated[
    dict[str, Annotated[Integer, Field(gt=0, le=65536)]] | None,
    BeforeValidator(_pattern),
    _any_of({"type": "object", "additionalProperties": {"type": "integer"}}),
]
AlphaPattern = Annotated[
    dict[str, Annotated[Number, Field(gt=0, le=65536)]] | None,
    BeforeValidator(_pattern),
    _any_of({"type": "object", "additionalProperties": {"type": "number"}}),
]
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_no_if_false)]
Start = Annotated[Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora"], BeforeValidator(_start)]

# What `qingtune compare` varies.
TrainingMethods = Annotated[list[TrainingMethod] | None, BeforeValidator(_split_commas)]
_Values = Annotated[list[Any], AfterValidator(_no_repeats)]
Grid = Annotated[dict[str, _Values] | None, BeforeValidator(_values_of_each)]
Space = Annotated[
    dict[str, Interval | _Values] | None, BeforeValidator(lambda value: _values_of_each(value, intervals=True))
]
SettingsOfMethods = Annotated[dict[TrainingMethod, dict[str, Any]] | None, BeforeValidator(_settings_of_methods)]
