"""A tokenizer as GGUF holds it, so that llama.cpp cuts text as it was cut in training; or why that cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from gguf import TokenType

from qingtune.errors import UserError
from qingtune.export.gguf_architectures import Value
from qingtune.output.invocation import command_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST

# Mistral's Tekken and GPT-4o's (Phi-4-mini): words by their capital and small letters.
_LETTERS_UP, _LETTERS_LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOW_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}*{_LETTERS_LOW}+"
_UP_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}+{_LETTERS_LOW}*"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"{_LOW_WORD}|{_UP_WORD}|\p{{N}}" + _REST_WITH_SLASH
_GPT4O = rf"{_LOW_WORD}{_CONTRACTIONS}?|{_UP_WORD}{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _REST_WITH_SLASH

# How text is cut before merges are applied, and whether a piece that is a token is then taken as it is (tokenizers
# call that ignore_merges) -> llama.cpp's name for it. llama.cpp has these rules built in; it reads none from a file.
PRE_TOKENIZERS: dict[tuple[tuple[tuple[str, str], ...], bool], str] = {
    ((("Split", _QWEN2), ("ByteLevel", "")), False): "qwen2",
    ((("Split", _QWEN35), ("ByteLevel", "")), False): "qwen35",
    ((("Split", _LLAMA3), ("ByteLevel", "")), True): "llama-bpe",
    ((("Split", _LLAMA3), ("ByteLevel", "")), False): "dbrx",  # Phi-4
    ((("Split", _TEKKEN), ("ByteLevel", "")), True): "tekken",
    ((("Split", _GPT4O), ("ByteLevel", "")), False): "gpt-4o",
    ((("ByteLevel", "regex"),), False): "gpt-2",
    ((("Digits", "individual"), ("ByteLevel", "regex")), False): "smollm",
}
_BY_CAPITALS = ("tekken", "gpt-4o")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# SentencePiece's steps before pairs are put together: spaces as a letter, perhaps one in front; and a step of Gemma's
# that cuts at spaces, of which there are none left.
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}
_NO_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
_WAYS = [([_PREFIX, _SPACES], None), ([_SPACES], None), ([_SPACES], _NO_CUT), ([], _METASPACE)]
# Where a file's name holds one of these, llama.cpp has the added tokens swallow the spaces after them, but for three.
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_KEEPS = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_PHI3_NEEDS = _PHI3_KEEPS | {"</s>"}  # without which it does not open such a file
MOST_ENDS = 3  # ids that end an answer: eos, eot, eom


@dataclass(frozen=True)
class Ending:
    """The ids at which llama.cpp is to stop, and those around a prompt.

    Attributes:
        end_of_turn: closes an answer; the file's eos.
        others: at which generation stops too.
        bos: the id that the model's texts begin with, if it has one.
        add_bos: whether prompts begin with it.
    """

    end_of_turn: int
    others: Sequence[int]
    bos: int | None
    add_bos: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int, ending: Ending) -> dict[str, Value]:
    """The metadata of a tokenizer, without a chat template.

    Args:
        tokenizer: as training used it.
        rows: of the embedding; ids without a token are filled with unused ones.
        ending: how answers end.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    content = _content(tokenizer)
    tokens, types = _tokens(content, rows)
    metadata = _pieces(content, tokens, types) if _is_sentencepiece(content) else _byte_level(content, tokens, types)
    metadata["tokenizer.ggml.eos_token_id"] = ending.end_of_turn
    for name, number in zip(("eot", "eom"), ending.others, strict=False):
        metadata[f"tokenizer.ggml.{name}_token_id"] = number
    special: list[tuple[str, Any]] = [
        ("bos", ending.bos), ("padding", tokenizer.pad_token_id), ("unknown", tokenizer.unk_token_id)
    ]  # fmt: skip
    for name, number in special:
        if number is not None and number < rows:
            metadata[f"tokenizer.ggml.{name}_token_id"] = number
    metadata["tokenizer.ggml.add_bos_token"] = ending.add_bos
    metadata["tokenizer.ggml.add_eos_token"] = False  # a prompt is not over at its end
    return metadata


def normalizes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings text into Unicode's composed form (NFC) first, which llama.cpp does not."""
    return (_content(tokenizer)["normalizer"] or {}).get("type") == "NFC"


def cuts_by_capitals(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words are cut where small letters end, which llama.cpp sees of a-z alone."""
    content = _content(tokenizer)
    return not _is_sentencepiece(content) and _pre_tokenizer(content) in _BY_CAPITALS


def spares_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts no space in front of a text that begins with one, as llama.cpp does."""
    return _content(tokenizer)["pre_tokenizer"] == _METASPACE


def swallows_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens swallow spaces after them, of which llama.cpp takes ASCII's alone."""
    return _is_phi3(_content(tokenizer))


def name_in_file(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A model's name so that llama.cpp, which has rules for the name Phi-3, takes the tokenizer as it is."""
    if not _is_phi3(_content(tokenizer)):
        return _PHI3.sub("phi 3", name)
    return name if _PHI3.search(name) else f"{name} (Phi-3)"


def _is_phi3(content: dict[str, Any]) -> bool:
    """Whether added tokens swallow spaces after them just as llama.cpp has it of Phi-3."""
    swallowing = {token["content"]: token["rstrip"] for token in content["added_tokens"]}
    return swallowing.keys() >= _PHI3_NEEDS and all(
        swallows != (text in _PHI3_KEEPS) for text, swallows in swallowing.items()
    )


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is SentencePiece's BPE, in which letters it does not know become bytes."""
    return content["model"]["type"] == "BPE" and bool(content["model"].get("byte_fallback"))


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json holds, or would hold; a UserError if it is not BPE without peculiarities."""
    if not tokenizer.is_fast:
        raise _refusal("it is written in Python and has no tokenizer.json")
    content: dict[str, Any] = json.loads(cast("Any", tokenizer).backend_tokenizer.to_str())
    model, normalizer, decoder = content["model"], content["normalizer"], content["decoder"] or {}
    pieces = _is_sentencepiece(content)
    if model["type"] != "BPE" or (decoder.get("type") == "ByteLevel") == pieces:
        raise _refusal(f"its type is {model['type']}; only BPE is supported, byte-level or SentencePiece's")
    if normalizer and normalizer["type"] != "NFC" and not pieces:
        raise _refusal(f"it changes text first ({normalizer['type']}), which llama.cpp does not")
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    odd += [
        f"{name} of {token['content']}"
        for token in content["added_tokens"]
        for name in ("single_word", "lstrip", "rstrip")
        if token[name] and not (name == "rstrip" and _is_phi3(content))
    ]
    if odd:
        raise _refusal(f"llama.cpp has no {', '.join(odd[:3])}")
    return content


def _byte_level(content: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "gpt2",  # llama.cpp's name for byte-level BPE
        "tokenizer.ggml.pre": _pre_tokenizer(content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(content),
    }


def _refusal(reason: str) -> UserError:
    return UserError(
        f"llama.cpp would tokenise text differently than this model's tokenizer: {reason}",
        fix=f"Use another base model, or `{command_line('merge')}` and a program that reads Transformers' layout.",
    )


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way text is cut first; a UserError if none is known to be the same."""
    outer: dict[str, Any] = content["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    parts: list[dict[str, Any]] = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    steps = tuple((str(part["type"]), _detail(part)) for part in parts)
    ignore_merges = bool(content["model"].get("ignore_merges"))
    if name := PRE_TOKENIZERS.get((steps, ignore_merges)):
        return name
    if other := PRE_TOKENIZERS.get((steps, not ignore_merges)):
        raise _refusal(f"its ignore_merges is {ignore_merges}, and {not ignore_merges} in llama.cpp's {other}")
    raise _refusal(f"its pre-tokenizer is not one that is known here ({steps})")


def _detail(part: dict[str, Any]) -> str:
    """What sets a step of cutting apart from others of its type; never empty for one that is not understood."""
    usual = {"Split": {"behavior": "Isolated", "invert": False}, "ByteLevel": {"add_prefix_space": False}, "Digits": {}}
    wanted = usual.get(part["type"])
    if wanted is None or any(part[name] != value for name, value in wanted.items()):
        return json.dumps(part)
    if part["type"] == "Split":
        return part["pattern"].get("Regex") or json.dumps(part)
    if part["type"] == "ByteLevel":
        return "regex" if part["use_regex"] else ""
    return "individual" if part["individual_digits"] else json.dumps(part)


def _tokens(content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types, one for each row of the embedding; a UserError if they do not fit."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= rows:
        raise UserError(f"the tokenizer has id {max(texts):,}, but the model has embeddings for {rows:,} ids")
    for number, text in texts.items():
        if number in added:
            types[number] = int(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        elif text != tokens[number]:  # models that come from GGUF bring its unused tokens along
            byte = content["model"].get("byte_fallback") and _BYTE.fullmatch(text)
            types[number] = int(TokenType.BYTE if byte else TokenType.NORMAL)
        tokens[number] = text
    if len(set(tokens)) != rows:
        raise _refusal("two of its ids have the same text")
    return tokens, types


def _merges(content: dict[str, Any]) -> list[str]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise _refusal("its merges contain spaces, which byte-level BPE writes as another character")
    return merges


# --- SentencePiece's BPE ---------------------------------------------------------------------------------------------


def _pieces(content: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Value]:
    """What llama.cpp reads of SentencePiece's BPE: a score by piece, the highest of which is put together first.

    Transformers holds the same as pairs in order. A file has no pairs, so that all which make the same piece have to
    follow one another, and none that llama.cpp would put together may be missing.
    """
    unknown = content["model"].get("unk_token")
    kinds = [int(TokenType.UNKNOWN) if text == unknown else kind for text, kind in zip(tokens, types, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",  # llama.cpp's name for SentencePiece's BPE
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": _scores(content, tokens, kinds),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _begins_with_space(content),
    }


def _begins_with_space(content: dict[str, Any]) -> bool:
    """Whether a space is put in front of each text; a UserError if text is cut or changed in another way."""
    outer: dict[str, Any] = content["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps: list[dict[str, Any]] = outer["normalizers"] if outer["type"] == "Sequence" else [outer]
    cut = content["pre_tokenizer"]
    if content["model"].get("ignore_merges") or (steps, cut) not in _WAYS:
        raise _refusal("its normalizer or pre-tokenizer is not one that is known here")
    return cut == _METASPACE or _PREFIX in steps


def _scores(content: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token."""
    model = content["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    made = ""
    for left, right in pairs:
        if left + right != made and left + right in ranks:
            raise _refusal(f"{left + right!r} is made at two places of the order of its merges")
        made = left + right
        ranks.setdefault(made, len(ranks))
    known, vocabulary = set(pairs), model["vocab"]
    plain = (int(TokenType.NORMAL), int(TokenType.BYTE))
    for text in (text for text, kind in zip(tokens, types, strict=True) if kind in plain):
        for place in range(1, len(text)):
            pair = text[:place], text[place:]
            if pair not in known and all(len(part) == 1 or part in vocabulary for part in pair):
                raise _refusal(f"it does not put {pair[0]!r} and {pair[1]!r} together, as llama.cpp would")
    if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise _refusal(f"its vocabulary lacks bytes, such as {missing[0]}")
    return [float(-ranks.get(text, len(ranks))) for text in tokens]
