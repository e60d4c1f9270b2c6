"""As much of Go's text/template as a Modelfile of ours uses, by its specification (https://pkg.go.dev/text/template)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+')


def render(template: str, **variables: Any) -> str:
    """What Go writes; raises ValueError for what it does not know, as Go does."""
    pieces = _ACTION.split(template)
    nodes = iter([("text" if place % 2 == 0 else "action", piece.strip() if place % 2 else piece)
                  for place, piece in enumerate(pieces)])  # fmt: skip
    tree, end = _block(nodes)
    if end is not None:
        raise ValueError(f"unexpected {end}")
    return _run(tree, variables, {"$": variables})


def _block(nodes: Iterator[tuple[str, str]]) -> tuple[list[Any], str | None]:
    """Nodes up to the `end` or `else` that closes them, which is returned too."""
    tree: list[Any] = []
    for kind, piece in nodes:
        if kind == "text":
            tree.append(("text", piece))
        elif piece == "end" or piece.split()[0] == "else":
            return tree, piece
        elif piece.split()[0] == "range":
            body, closed = _block(nodes)
            if closed != "end":
                raise ValueError("range is not closed")
            tree.append(("range", piece.removeprefix("range"), body))
        elif piece.split()[0] == "if":
            tree.append(_conditional(piece.removeprefix("if"), nodes))
        else:
            tree.append(("value", piece))
    return tree, None


def _conditional(condition: str, nodes: Iterator[tuple[str, str]]) -> Any:
    body, closed = _block(nodes)
    if closed is None:
        raise ValueError("if is not closed")
    if closed.startswith("else if"):
        return ("if", condition, body, [_conditional(closed.removeprefix("else if"), nodes)])
    otherwise: list[Any] = []
    if closed == "else":
        otherwise, closed = _block(nodes)
    if closed != "end":
        raise ValueError("if is not closed")
    return ("if", condition, body, otherwise)


def _run(tree: Sequence[Any], dot: Any, names: Mapping[str, Any]) -> str:
    out: list[str] = []
    for kind, *rest in tree:
        if kind == "text":
            out.append(rest[0])
        elif kind == "value":
            out.append(str(_value(rest[0], dot, names)))
        elif kind == "if":
            out.append(_run(rest[1] if _value(rest[0], dot, names) else rest[2], dot, names))
        else:
            variables, _, expression = rest[0].partition(":=")
            index, item = (name.strip() for name in variables.split(","))
            for place, element in enumerate(_value(expression, dot, names)):
                out.append(_run(rest[1], element, {**names, index: place, item: element}))
    return "".join(out)


def _value(expression: str, dot: Any, names: Mapping[str, Any]) -> Any:
    words = _WORD.findall(expression)
    value = _call(words, dot, names)
    if words:
        raise ValueError(f"left over: {words}")
    return value


def _call(words: list[str], dot: Any, names: Mapping[str, Any]) -> Any:
    """A function with its arguments, or one value; takes the words it used."""
    function = words[0] if words[0] in ("and", "eq", "ne") else None
    if function:
        words.pop(0)
    values: list[Any] = []
    while words and words[0] != ")":
        values.append(_operand(words, dot, names))
    if function is None:
        (value,) = values
        return value
    if function == "and":
        return all(values)
    if type(values[0]) is not type(values[1]):
        raise ValueError("incompatible types for comparison")
    return (values[0] == values[1]) is (function == "eq")


def _operand(words: list[str], dot: Any, names: Mapping[str, Any]) -> Any:
    word = words.pop(0)
    if word == "(":
        value = _call(words, dot, names)
        if words.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if word.startswith('"'):
        return word[1:-1].encode().decode("unicode_escape")
    if word.startswith("."):
        return dot[word[1:]]
    if word.startswith("$"):
        return names[word]
    return int(word)
