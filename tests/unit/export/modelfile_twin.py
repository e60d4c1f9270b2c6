"""Ollama's reading of a Modelfile, by how it behaves: commands with their values, in order."""

from __future__ import annotations

import unicodedata

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "parameter",
    "message",
    "renderer",
    "parser",
    "requires",
}


def read(text: str) -> list[tuple[str, str]]:
    """Commands as (name, value); a parameter's name is its own. Raises ValueError where Ollama refuses the file."""
    found: list[tuple[str, str]] = []
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest[0] == "#":
            rest = rest[min((place for end in "\r\n" if (place := rest.find(end)) >= 0), default=len(rest)) :]
            continue
        name, rest = _word(rest)
        if name.lower() not in COMMANDS:
            raise ValueError(f"{name!r} is no command")
        if name.lower() == "parameter":
            name, rest = _word(rest)
        value, rest = _value(rest)
        found.append((name.lower(), value))
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM line")
    return found


def _word(text: str) -> tuple[str, str]:
    end = next(
        place for place, letter in enumerate(text) if not (letter.isascii() and (letter.isalnum() or letter == "_"))
    )
    if text[end] not in " \t":
        raise ValueError("a space is wanted")
    return text[:end], text[end + 1 :]


def _value(text: str) -> tuple[str, str]:
    """Up to the first end of a line at which the quotes are closed; letters that Go does not print are dropped."""
    held = ""
    for place, letter in enumerate(text):
        if letter in "\r\n" and (value := _unquoted(held.strip())) is not None:
            return value, text[place:]
        if letter in " \t\r\n" or unicodedata.category(letter)[0] in "LMNPS":
            held += letter
    value = _unquoted(held.strip())
    if value is None:
        raise ValueError("quotes that never close")
    return value, ""


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            return text[len(quotes) : -len(quotes)] if len(text) >= 2 * len(quotes) and text.endswith(quotes) else None
    return text
