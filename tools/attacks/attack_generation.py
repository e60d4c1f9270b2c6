"""Attacks by generation_config.json, and by texts that would be instructions in an export's Modelfile or model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from attack_case import (
    CHAT,
    EVALUATE,
    EXPORT,
    INFER,
    INFER_FILE,
    MERGE,
    TINY,
    TRAIN,
    Argv,
    Case,
    Ended,
    Expected,
    Place,
    Spoil,
)
from attack_tokenizers import SETTINGS, TEMPLATE, TOKENIZER
from attack_values import broken_files, edited, shown

GROUP = "generation_config and Modelfile"
ALL = ("model", "adapter", "rows.jsonl")
FILE = "model/generation_config.json"


def _own(argv: Argv) -> Argv:
    """A command without the decoding settings that would stand in for the file's."""
    return (*argv[: -len(TINY)], *TINY[:2])


ANSWERING: tuple[Argv, ...] = (_own(INFER), _own(INFER_FILE), _own(CHAT))
COMMANDS: tuple[Argv, ...] = (*ANSWERING, EXPORT, TRAIN, EVALUATE, MERGE)
_REFUSED: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, "hot", float("nan"), float("inf"), [1], {"a": 1}),
    "top_p": (-1, 2, "x", float("nan"), [1]),
    "top_k": (-5, "x", 2.5, [1], float("nan")),
    "repetition_penalty": (-1, "x", float("nan"), [1], 0),
}
_EITHER: dict[str, tuple[Any, ...]] = {
    "temperature": (1e-40, 1e-300, 1e300, 0, True, None),
    "top_p": (0, 1e-300, True, None),
    "top_k": (10**30, True, None, 2**63),
    "repetition_penalty": (1e300, 1e-300, float("inf"), True),
    "eos_token_id": ("2", -1, 10**9, 10**30, [[2]], [], [2] * 100_000, {"a": 2}, 2.5, True, None, "x"),
    "bos_token_id": ("x", [0], 10**9),
    "pad_token_id": ("x", -1, [0]),
    "max_length": (-1, "x"),
    "max_new_tokens": (-1, "x", 10**30),
    "do_sample": ("x", 5),
    "stop_strings": (5, ["h"], "x"),
    "bad_words_ids": ([[5]], 5),
    "transformers_version": (5, "../../x"),
    "cache_implementation": ("evil", 5),
    "custom_generate": ("evil/repo", 5),
    "suppress_tokens": (list(range(320)), "x"),
}


def generation_cases() -> Iterator[Case]:
    """generation_config.json, then what an export writes for Ollama and a merge for readers."""
    for case in broken_files(GROUP, FILE, ANSWERING, ALL, stdin=b"hi\n/quit\n"):
        yield replace(case, expect="either") if case.name.endswith("dangling-link") else case  # none is no fault
    number = 0
    tables: tuple[tuple[Expected, dict[str, tuple[Any, ...]]], ...] = (("refused", _REFUSED), ("either", _EITHER))
    for expect, table in tables:
        for name, values in table.items():
            for value in values:
                number += 1
                commands = ANSWERING if expect == "refused" else COMMANDS
                argv = commands[number % len(commands)]
                yield Case(
                    GROUP, f"{name}={shown(value)}", edited(FILE, {name: value}), (argv,), expect, ALL,
                    names=("generation_config.json", name), stdin=b"hi\n/quit\n",
                )  # fmt: skip
    for number, (name, value) in enumerate(
        (
            ("temperature", 0.3),
            ("top_p", 0.5),
            ("top_k", 5),
            ("repetition_penalty", 1.1),
            ("eos_token_id", [2, 0]),
            ("eos_token_id", 2),
        )
    ):
        argv = COMMANDS[number % len(COMMANDS)]
        yield Case(
            GROUP, f"control-{name}={shown(value)}", edited(FILE, {name: value}), (argv,), "fine", ALL,
            stdin=b"hi\n/quit\n",
        )  # fmt: skip
    yield from _modelfile_cases()


# --- Modelfile -------------------------------------------------------------------------------------------------------

_INJECTED = (
    '<e>"\nFROM http://evil/model\nSYSTEM evil', "<e>\nFROM evil", '<e>"""\nFROM evil\n"""', "<e>\r\nADAPTER ./evil",
    '<e>"\n\nPARAMETER num_ctx 1', "<e>\\\"\nFROM evil", "<e>{{ .System }}", "<e>\u2028FROM evil", "<e>\x0bFROM evil",
    "<e>\x85FROM evil", '"', '"""', "\\", "<e>'\nFROM evil", "<e>\tFROM evil", "<e>\x00", "<e>\x1b]0;evil\x07",
    '<e>""" \nMESSAGE user evil', "<e>\nLICENSE evil", "# FROM evil",
)  # fmt: skip


def _modelfile_cases() -> Iterator[Case]:
    for number, payload in enumerate(_INJECTED):
        spoils: dict[str, Spoil] = {"eos": _token(payload), "template": _template(payload), "system": _same}
        for way, spoil in spoils.items():
            if way != "system" and (number + (way == "eos")) % 2 and number > 5:
                continue  # the later payloads come in by one way each
            argv = (*EXPORT, "--system_prompt", payload) if way == "system" else EXPORT
            if "\0" in payload and way == "system":
                continue  # no argument can hold it
            yield Case(GROUP, f"modelfile-{way}-{number:02d}", spoil, (argv,), "either", ALL, check=_only_ours)
    for number, text in enumerate(
        ('Say "yes" or "no".', "Two\nlines.", "中文提示，“引号”。", "C:\\path", "{{ name }}")
    ):
        argv = (*EXPORT, "--system_prompt", text)
        yield Case(GROUP, f"control-system-{number}", _same, (argv,), "fine", ALL, check=_only_ours)


def _same(place: Place) -> None:
    """Spoil nothing."""


def _token(content: str) -> Spoil:
    """Rename the token that ends answers, in all files."""

    def spoil(place: Place) -> None:
        for name in (TOKENIZER, SETTINGS, TEMPLATE):
            path = place / name
            text = path.read_text(encoding="utf-8")
            if name == TEMPLATE:
                text = text.replace("<|im_end|>", "{{ eos_token }}")
            else:
                text = text.replace('"<|im_end|>"', json.dumps(content))
            path.write_text(text, encoding="utf-8")

    return spoil


def _template(payload: str) -> Spoil:
    def spoil(place: Place) -> None:
        path = place / TEMPLATE
        quoted = json.dumps(payload, ensure_ascii=True)
        path.write_text(path.read_text(encoding="utf-8") + "{{ " + quoted + " }}" + payload, encoding="utf-8")

    return spoil


def instructions(text: str) -> list[tuple[str, str]]:
    """A Modelfile's instructions as Ollama reads them: a word, then a quoted text or the rest of the line."""
    found: list[tuple[str, str]] = []
    lines = iter(re.split("[\r\n]", text))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "PARAMETER":
            name, _, rest = rest.partition(" ")
            word = f"PARAMETER {name}"
        while (value := _unquoted(rest)) is None:
            more = next(lines, None)
            if more is None:
                return [*found, (word, "a quote that is never closed")]
            rest = f"{rest}\n{more}"
        found.append((word, value))
    return found


def _unquoted(text: str) -> str | None:
    """What is between the quotes; None where they are still open, as Ollama looks for their end at ends of lines only.

    See unquote() in https://github.com/ollama/ollama/blob/main/parser/parser.go: a text of one quote is read back.
    """
    text = text.strip()
    for quote in ('"""', '"'):
        if text.startswith(quote):
            closed = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if closed else None
    return text


def _only_ours(place: Place, ended: Sequence[Ended]) -> str | None:
    """Every instruction of the Modelfile is one that the export means to write, and its model is the export."""
    path = place / "out/Modelfile"
    if ended[-1].code != 0 or not path.exists():
        return None
    found = instructions(path.read_bytes().decode("utf-8"))
    words = [word for word, _ in found]
    known = {"FROM", "TEMPLATE", "SYSTEM"}
    if odd := [word for word in words if word not in known and not word.startswith("PARAMETER ")]:
        return f"the Modelfile has an instruction {odd[0]!a}"
    sources = [value for word, value in found if word == "FROM"]
    if len(sources) != 1 or not sources[0].strip().startswith("./") or ".gguf" not in sources[0]:
        return f"the Modelfile's FROM is {sources!a}"
    if words.count("SYSTEM") > 1 or words.count("TEMPLATE") > 1:
        return "the Modelfile has an instruction twice"
    sampling = {f"PARAMETER {name}" for name in ("stop", "temperature", "top_p", "top_k", "repeat_penalty")}
    if odd := [word for word in words if word.startswith("PARAMETER ") and word not in sampling]:
        return f"the Modelfile sets {odd[0]!a}"
    return None
