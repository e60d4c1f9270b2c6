"""Bounds on what a tokenizer may do to a text, looked at before it reads one: it comes with a model, from a stranger.

The steps around the vocabulary (normalising, cutting, decoding) could let a text grow without end, run a regular
expression for years or fail within. Each step is of a known type and bounded; a regular expression is known, or so
simple that it takes one pass, or else the tokenizer works in a process with limits (tokenizer_calls.py).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qingtune.errors import UserError
from qingtune.files.json_files import INDEX_BYTES, check_fields, number, read_bytes, read_object_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_FILE_BYTES = 128 << 20  # of a tokenizer.json; those of 260,000 tokens have some 40 MB
MOST_LETTERS = 1_000  # of a token that is looked for in texts before they are cut; usual ones have some ten
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # Transformers writes the first
MOST_STEPS = 64
MOST_DEPTH = 4
MOST_GROWTH = 64  # times that the steps of one kind may lengthen a text together
MOST_TOKENS = 64  # put around a text
MOST_BYTES = 256  # that a compiled normaliser writes for a character
_NESTED = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"
}  # fmt: skip
_KNOWN = {
    "normalizer": {
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend",
        "Replace", "Strip", "StripAccents",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation",
        "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    "decoder": {
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece",
    },
}  # fmt: skip

# How published models cut text: GPT-2, Llama 3, Qwen 2 and 3.5, DeepSeek 3, GPT-4o and gpt-oss, Mistral's Tekken.
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST,
    _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST,
    _ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _REST,
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*""" + _REST,
    _WORDS % (2 * (_ENGLISH + "?",)) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST,
    _WORDS % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST,
)
# One character, class or escape, repeated or not: text can be matched in one way alone.
_ONE_PASS = re.compile(
    r"(?:[^\\\[\](){}.*+?|^$]|\.|\\[pP]\{\^?\w+\}|\\(?:[dDsSwWnrt]|\W)|\[\^?\]?(?:\\.|[^\[\]\\&])+\])(?:[*+?]|\{\d{0,3},?\d{0,3}\})?"
)


class UnsafeTokenizer(UserError):
    """A tokenizer that could hang, take all memory or fail on a text; says why."""


def check_tokenizer_files(folder: Path) -> None:
    """Look at a tokenizer's files before they are loaded.

    Raises:
        ValueError, RecursionError: tokenizer.json cannot be read.
        UserError: a file is broken, or is not a regular file.
    """
    with contextlib.suppress(FileNotFoundError):  # the vocabulary may be in files of another kind
        check_tokenizer_file(folder / "tokenizer.json")
    for name in SETTINGS:
        content = read_object_if_there(folder / name, INDEX_BYTES)
        if content and name == SETTINGS[0]:
            check_fields(content, {"model_max_length": number()}, str(folder / name))


def check_loaded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Look at a tokenizer that was loaded from a folder, whatever files it was made of.

    Raises:
        UserError: it has no vocabulary, which a missing file may leave; or it is an UnsafeTokenizer.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    longest = max(added, key=len, default="")
    if len(longest) > MOST_LETTERS:
        raise UnsafeTokenizer(f"it adds a token of {len(longest):,} characters")
    if tokenizer.vocab_size <= len(added) and not tokenizer.get_vocab().keys() - added:
        raise UserError("the tokenizer has no vocabulary", where=str(folder), fix="Check that the folder is complete.")
    check_steps(steps_of(tokenizer))


def check_tokenizer_file(path: Path) -> dict[str, Any]:
    """Look at a tokenizer.json before it is loaded, as loading runs its normaliser; returns what it holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError, RecursionError: it cannot be read.
        UserError: it is no plain file; or its steps are not bounded (UnsafeTokenizer).
    """
    text = read_bytes(path, MOST_FILE_BYTES).decode("utf-8")
    content = json.loads(text, object_pairs_hook=_without_repeats)
    if not isinstance(content, dict):
        raise UnsafeTokenizer("it is not a JSON object")
    check_steps(content)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise UnsafeTokenizer("it splits text at random (dropout)")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that comes twice, others might take the other value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnsafeTokenizer("a key occurs twice in it")
    return found


def steps_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The steps of a loaded tokenizer by their kind, as tokenizer.json holds them; nothing for one in Python."""
    if not tokenizer.is_fast:
        return {}
    backend: Any = cast("Any", tokenizer).backend_tokenizer
    steps = {kind: getattr(backend, kind) for kind in _KNOWN}
    return {kind: json.loads(step.__getstate__()) for kind, step in steps.items() if step is not None}


def check_steps(content: Mapping[str, Any]) -> None:
    """Look at the steps around a vocabulary, by their kinds as tokenizer.json holds them.

    Raises:
        UnsafeTokenizer: they are not bounded.
    """
    for kind in _KNOWN:
        try:
            growth = 1.0
            for step in _flat(content.get(kind), kind, MOST_DEPTH):
                growth *= _growth(step, kind)
            if growth > MOST_GROWTH:
                times = f"{growth:,.0f}" if growth < 1e6 else "over a million"
                raise UnsafeTokenizer(f"its {kind} may lengthen a text by a factor of {times}")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UnsafeTokenizer(f"its {kind} is broken ({type(error).__name__}: {error})") from None


def has_foreign_patterns(content: Mapping[str, Any]) -> bool:
    """Whether checked steps cut text by a regular expression of which it is not known how long it takes."""
    cutting = _flat(content.get("pre_tokenizer"), "pre_tokenizer", MOST_DEPTH)
    return any(step["type"] == "Split" and not _takes_one_pass(step["pattern"]) for step in cutting)


def _flat(step: Any, kind: str, depth: int) -> Iterator[dict[str, Any]]:
    """Single steps, those of a sequence one after the other."""
    if step is None:
        return
    if step["type"] != "Sequence":
        if step["type"] not in _KNOWN[kind]:
            raise UnsafeTokenizer(f"its {kind} is of the unknown type {str(step['type'])[:40]!r}")
        yield step
        return
    inner = step[_NESTED[kind]]
    if depth == 0 or len(inner) > MOST_STEPS:
        raise UnsafeTokenizer(f"its {kind} has too many steps")
    for part in inner:
        yield from _flat(part, kind, depth - 1)


def _growth(step: Mapping[str, Any], kind: str) -> float:
    """How many times a step may lengthen a text.

    Raises:
        UnsafeTokenizer: it is not bounded.
    """
    name, size = step["type"], 0
    if name in ("Replace", "Split"):
        pattern = step["pattern"]
        literal = pattern.get("String")
        if literal == "" or (name == "Replace" and not _takes_one_pass(pattern)):
            raise UnsafeTokenizer(f"its {kind} looks for {next(iter(pattern.values()))!r}, which may never end")
        if name == "Replace":
            return max(1, len(step["content"]) / len(literal) if literal else len(step["content"]) + 1)
    elif name == "Prepend":
        size = len(step["prepend"])
    elif name == "Strip" and kind == "decoder":
        size = max(step.get("start", 0), step.get("stop", 0))
    elif name == "TemplateProcessing":
        around = [step["single"], step["pair"], *(token["ids"] for token in step["special_tokens"].values())]
        size = max(map(len, around))
    elif name == "FixedLength" and step["length"] < 1:
        raise UnsafeTokenizer(f"its {kind} cuts text into pieces of {step['length']} characters")
    elif name == "Precompiled" and _longest_replacement(step["precompiled_charsmap"]) > MOST_BYTES:
        raise UnsafeTokenizer(f"its {kind} may lengthen a character to over {MOST_BYTES} bytes")
    if size > MOST_TOKENS:
        raise UnsafeTokenizer(f"its {kind} adds or takes {size:,} at once ({name})")
    return 1


def _longest_replacement(charsmap: str | None) -> int:
    """Bytes of the longest text that SentencePiece's compiled normaliser writes for some others."""
    if not charsmap:
        return 0
    try:
        data = base64.b64decode(charsmap, validate=True)
    except binascii.Error:
        return 0  # which the library refuses
    trie = int.from_bytes(data[:4], "little")  # its size, before the texts
    return max(map(len, data[4 + trie :].split(b"\0")))


def _takes_one_pass(pattern: Mapping[str, Any]) -> bool:
    """Whether a pattern is a text, a known regular expression or one that matches in one way alone."""
    if "String" in pattern:
        return True
    regex: str = pattern["Regex"]
    return regex in PATTERNS or _ONE_PASS.fullmatch(regex) is not None
