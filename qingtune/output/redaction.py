"""Keep tokens and passwords out of messages and of what leaves this machine: a result's files, its page, its card.

Answers, and what is compared when a run resumes, are never changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from qingtune.output.secret_patterns import NAMED, NO_SECRET_NAME, SECRET_NAME, SHORTEST_VALUE, TOKENS, WORD

HIDDEN = "***"


def redact(text: str) -> str:
    """The text with three stars for each secret: values of such environment variables, and what looks like one."""
    return _without(text, _secrets_of_environment())


def redact_values(value: Any) -> Any:
    """The same for every text in a JSON value, keys of objects included."""
    return _values_without(value, _secrets_of_environment())


def _without(text: str, secrets: Iterable[str]) -> str:
    for value in secrets:
        text = text.replace(value, HIDDEN)
    for pattern in (*TOKENS.values(), *NAMED.values()):
        text = pattern.sub(_hide, text)
    return text


def _values_without(value: Any, secrets: Iterable[str]) -> Any:
    if isinstance(value, str):
        return _without(value, secrets)
    if isinstance(value, dict):
        hidden: dict[Any, Any] = {}
        for key, item in value.items():
            shown = _without(key, secrets) if isinstance(key, str) else key
            while shown != key and shown in hidden:  # two keys must not become one
                shown += HIDDEN
            hidden[shown] = _values_without(item, secrets)
        return hidden
    return [_values_without(item, secrets) for item in value] if isinstance(value, (list, tuple)) else value


def find_token(text: str) -> str | None:
    """What certain secret a text holds, in words: a known kind of token, or a variable's value; None without one."""
    for value, name in _secrets_of_environment().items():
        if value in text:
            return f"the value of {name}"
    return next((kind for kind, pattern in TOKENS.items() if pattern.search(text)), None)


def find_secret(text: str) -> str | None:
    """The same, or what is a secret by the name in front of it."""
    found = find_token(text)
    return found or next((kind for kind, pattern in NAMED.items() if pattern.search(text)), None)


def _hide(found: re.Match[str]) -> str:
    if "secret" not in found.re.groupindex or found["secret"] is None:
        return HIDDEN
    start, end = (place - found.start() for place in found.span("secret"))
    return found[0][:start] + HIDDEN + found[0][end:]


def _secrets_of_environment() -> dict[str, str]:
    """Values of secret variables, each with a variable's name; before each value those that it is a part of."""
    longest_first = sorted(os.environ.items(), key=lambda variable: len(variable[1]), reverse=True)
    return {
        value: name
        for name, value in longest_first
        if len(value) >= SHORTEST_VALUE
        and SECRET_NAME.search(name)
        and not NO_SECRET_NAME.fullmatch(name)
        and not WORD.fullmatch(value)
    }
