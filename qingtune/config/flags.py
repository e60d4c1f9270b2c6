"""Command-line flags, made from the schema: a flag for each setting, of the same name."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from qingtune.config.training import Settings
from qingtune.errors import UserError

LONGEST_VALUE = 40  # characters of a value's choices that are shown next to the flag in --help


def parse_flags(
    schema: type[Settings], command: str, description: str, argv: Sequence[str], *, config_file: bool = False
) -> tuple[str | None, dict[str, str]]:
    """Split a command line into the configuration file's path and the flags given, as text, unchecked.

    `--name value`, `--name=value` and, for switches, a bare `--name` are understood; `-h` prints the help and exits.
    Flags that the schema lacks are passed on, so that they are reported together with everything else that is wrong.

    Raises:
        UserError: for words that belong to no flag.
    """
    parser = argparse.ArgumentParser(
        prog=command, description=description, allow_abbrev=False, usage=f"{command} [--name value ...]"
    )
    if config_file:
        parser.add_argument("--config_file", metavar="FILE", help="A JSON file of settings; flags override it.")
    headings: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        heading = extra_of(field, "group")
        if heading not in headings:
            headings[heading] = parser.add_argument_group(heading)
        switch, several = bool in kinds_of(field), bool(extra_of(field, "words"))
        value, choices = value_of(field), ""
        if len(value) > LONGEST_VALUE:
            value, choices = "NAME", f"One of {value.replace('|', ', ')}."
        headings[heading].add_argument(
            *(f"--{word}" for word in (name, extra_of(field, "flag")) if word),
            nargs="?" if switch else "+" if several else None,
            const="true" if switch else None,
            default=argparse.SUPPRESS,
            action="extend" if several else "store",
            metavar=value,
            help=f"{field.description} {choices} {default_of(field)}".strip().replace("%", "%%"),
        )
    known, unknown = parser.parse_known_args([_with_underscores(word) for word in argv])
    flags = {name: " ".join(value) if isinstance(value, list) else value for name, value in vars(known).items()}
    return flags.pop("config_file", None), flags | _pair(unknown)


def _with_underscores(word: str) -> str:
    """Read --lora-r as --lora_r; other words are not changed."""
    flag = re.match(r"--[a-z][a-z0-9_-]*(?==|$)", word)
    return "--" + flag[0][2:].replace("-", "_") + word[flag.end() :] if flag else word


def _pair(words: Sequence[str]) -> dict[str, str]:
    """Pair flags that the parser does not know with their values."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            flags[name] = value if equals else "true"
        elif name and flags[name] == "true":
            flags[name] = word
        else:
            raise UserError(f'"{word}" is not a flag', where="command line", fix="Pass settings as --name value.")
    return flags


def extra_of(field: FieldInfo, name: Literal["group", "flag", "words"]) -> str:
    """What `setting` keeps with a field: its heading, its second flag, or the form of its words; empty if not given."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra.get(name, ""))


def kinds_of(field: FieldInfo) -> list[Any]:
    """The plain types and choices that a setting's annotation allows, None left out."""

    def flatten(kind: Any) -> list[Any]:
        if get_origin(kind) in (Union, types.UnionType):
            return [part for member in get_args(kind) for part in flatten(member)]
        if hasattr(kind, "__metadata__"):
            return flatten(get_args(kind)[0])
        return [] if kind is types.NoneType else [kind]

    return flatten(field.annotation)


def value_of(field: FieldInfo) -> str:
    """Placeholder of the value in help and docs: the choices, or the type in capitals."""
    if words := extra_of(field, "words"):
        return words
    names = []
    for kind in kinds_of(field):
        if get_origin(kind) is Literal:
            names.append("|".join(str(choice) for choice in get_args(kind)))
        elif get_origin(kind) is list:
            names.append("A,B,...")
        else:
            names.append({bool: "true|false", int: "N", float: "X", str: "TEXT"}.get(kind, "JSON"))
    return " or ".join(names)


def default_of(field: FieldInfo) -> str:
    """The default in brackets; empty where the description says what happens without a value."""
    if field.default is None or field.is_required():
        return ""
    if isinstance(field.default, list):
        return f"[{','.join(field.default)}]"
    return f"[{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
