"""Tokenizers of every kind that models bring, made on the fly: what they put around a text, and how they cut it."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from conftest import CHATML, TEXTS, make_tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
LETTERS = [*string.digits, *string.ascii_letters, *string.punctuation]

# Chat templates of every kind, by what they do.
TEMPLATES: dict[str, str | None] = {
    "chatml": CHATML,
    # Like Qwen2.5: a system message of its own where there is none.
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML,
    # Like Qwen3: thoughts only after the last question, an empty block where the answer brings none.
    "thinking": (
        "{% set here = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set here.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        "{% if loop.index0 > here.last %}<think>\n"
        "{{ (parts[0] | replace('<think>', '') | trim) if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
        "{{ (parts[-1] | trim) if parts | length > 1 else parts[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain style": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "no end of turn": (
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}"
    ),
    "no template": None,
}


def _fast(inner: Any, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _around(inner: Any, single: str, *tokens: str) -> None:
    from tokenizers import processors

    ids = [(token, inner.token_to_id(token)) for token in tokens]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=ids)


def byte_level_with_bos() -> Any:
    """Like Llama 3's."""
    tokenizer = make_tokenizer(None)
    _around(tokenizer.backend_tokenizer, "<|endoftext|> $A", "<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def byte_level_with_eos() -> Any:
    """One that closes every text."""
    tokenizer = make_tokenizer(None)
    _around(tokenizer.backend_tokenizer, "$A <|im_end|>", "<|im_end|>")
    return tokenizer


def two_tokens_in_front() -> Any:
    """Like GLM's, which begins texts with two tokens of which neither is a bos."""
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    _around(tokenizer.backend_tokenizer, "[gMASK] <sop> $A", "[gMASK]", "<sop>")
    return tokenizer


def llama_2() -> Any:
    """SentencePiece BPE with bytes for the rest; `add_bos_token` comes from tokenizer_config.json."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return LlamaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], add_bos_token=True)


def gemma() -> Any:
    """SentencePiece BPE without a space in front; turn delimiters are in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *CHAT_TOKENS, *(f"<0x{b:02X}>" for b in range(256)), "▁", *LETTERS]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    inner.add_tokens([AddedToken("\n\n", normalized=False)])
    _around(inner, "<bos> $A", "<bos>")
    return _fast(inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def unigram() -> Any:
    """Like T5's: closes every text; text is brought into a compatible form first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *"世界你好，。", "▁the", "ing"]
    inner = Tokenizer(models.Unigram([(piece, -float(number > 2)) for number, piece in enumerate(pieces)], 0, False))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    _around(inner, "$A </s>", "</s>")
    return _fast(inner, eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """Like BERT's: [CLS] and [SEP] around every text, and no eos."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    _around(inner, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return _fast(inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


# By kind: what makes it, and the tokens that it puts before and after a text by itself.
KINDS: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "byte-level BPE": (lambda: make_tokenizer(None), [], []),
    "byte-level BPE with bos": (byte_level_with_bos, ["<|endoftext|>"], []),
    "byte-level BPE with eos": (byte_level_with_eos, [], ["<|im_end|>"]),
    "two tokens in front": (two_tokens_in_front, ["[gMASK]", "<sop>"], []),
    "Llama 2": (llama_2, ["<s>"], []),
    "Gemma": (gemma, ["<bos>"], []),
    "Unigram": (unigram, [], ["</s>"]),
    "WordPiece": (word_piece, ["[CLS]"], ["[SEP]"]),
}
assert TEXTS


def with_chatml(tokenizer: Any, chat_template: str) -> Any:
    """A tokenizer with a chat template and its tokens: <|im_start|> marked as special, <|im_end|> not."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in CHAT_TOKENS[1:]])
    tokenizer.chat_template = chat_template
    return tokenizer
