"""A tokenizer goes into GGUF whole, or is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from qingtune.errors import UserError
from qingtune.export.gguf_vocab import Ending, normalizes, vocabulary_of

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
ENDING = Ending(end_of_turn=2, others=[0], bos=None, add_bos=False)


def tokenizer_with(**changes: Any) -> Any:
    """The tiny tokenizer with parts of its tokenizer.json replaced."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"] |= changes.pop("model", {})
    inner = Tokenizer.from_str(json.dumps(content))
    for name, value in changes.items():
        setattr(inner, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def split(regex: str, **changes: Any) -> Any:
    step = pre_tokenizers.Split(Regex(regex), **{"behavior": "isolated", **changes})
    return pre_tokenizers.Sequence([step, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits(individual: bool) -> Any:
    steps = [pre_tokenizers.Digits(individual_digits=individual), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt-2", {}),
        ("gpt-2", {"normalizer": normalizers.NFC()}),
        ("qwen2", {"pre_tokenizer": split(QWEN2)}),
        ("qwen35", {"pre_tokenizer": split(QWEN35)}),
        ("llama-bpe", {"pre_tokenizer": split(LLAMA3), "model": {"ignore_merges": True}}),
        ("smollm", {"pre_tokenizer": digits(True)}),
    ],
)
def test_the_way_of_cutting_is_known_by_its_rules(name: str, changes: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(**changes)
    assert vocabulary_of(tokenizer, 320, ENDING)["tokenizer.ggml.pre"] == name
    assert normalizes(tokenizer) == ("normalizer" in changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": split(r"\w+|\W+")}, r"not one that is known here .*w\+"),
        ({"pre_tokenizer": split(QWEN2, behavior="removed")}, "not one that is known"),
        ({"pre_tokenizer": split(QWEN2, invert=True)}, "not one that is known"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "not one that is known"),
        ({"pre_tokenizer": digits(False)}, "not one that is known"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "not one that is known"),
        ({"pre_tokenizer": split(LLAMA3)}, "ignore_merges is False, and True"),
        ({"pre_tokenizer": split(QWEN2), "model": {"ignore_merges": True}}, "ignore_merges is True, and False"),
        ({"normalizer": normalizers.Lowercase()}, "changes text first .Lowercase"),
        ({"model": {"byte_fallback": True}, "decoder": decoders.ByteFallback()}, "SentencePiece"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has no end_of_word_suffix"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        vocabulary_of(tokenizer_with(**changes), 320, ENDING)


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}, unk_token="a"), models.Unigram([("a", 0.0)], 0)])
def test_other_kinds_of_tokenizers_are_refused(model: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(UserError, match=r"its type is (WordLevel|SentencePiece)"):
        vocabulary_of(tokenizer, 1, ENDING)


def test_tokens_merges_and_types() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    count = len(tokenizer)
    written = vocabulary_of(tokenizer, count + 3, Ending(2, [0, 5, 6], None, add_bos=False))
    tokens: Any = written["tokenizer.ggml.tokens"]
    types: Any = written["tokenizer.ggml.token_type"]
    assert tokens[:count] == tokenizer.convert_ids_to_tokens(list(range(count)))
    assert tokens[count:] == [f"[PAD{count + number}]" for number in range(3)]
    assert types == [CONTROL] * 3 + [NORMAL] * (count - 4) + [USER_DEFINED] + [UNUSED] * 3
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert written["tokenizer.ggml.merges"] == [" ".join(pair) for pair in inner["merges"]]
    ids = {name.split(".")[-1]: value for name, value in written.items() if name.endswith("_id")}
    assert ids == {"eos_token_id": 2, "eot_token_id": 0, "eom_token_id": 5, "padding_token_id": 0}


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_first_token_is_as_the_prompts_begin(add_bos: bool) -> None:
    written = vocabulary_of(make_tokenizer(), 320, Ending(2, [], 1, add_bos=add_bos))
    assert written["tokenizer.ggml.bos_token_id"] == 1
    assert written["tokenizer.ggml.add_bos_token"] is add_bos
    assert written["tokenizer.ggml.add_eos_token"] is False


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="embeddings for 300 ids"):
        vocabulary_of(make_tokenizer(), 300, ENDING)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_swallow_spaces_are_refused(flag: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", **{flag: True})])
    with pytest.raises(UserError, match=f"{flag} of <mask>"):
        vocabulary_of(tokenizer, 400, ENDING)
