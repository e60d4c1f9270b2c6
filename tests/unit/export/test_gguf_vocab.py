"""A tokenizer goes into GGUF whole, or is refused with the reason."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, TEXTS, make_model, make_tokenizer
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig
from qingtune.errors import UserError
from qingtune.export.gguf_vocab import (
    Ending,
    cuts_by_capitals,
    name_in_file,
    normalizes,
    spares_a_space,
    swallows_spaces,
    vocabulary_of,
)
from qingtune.models.find import find_model
from qingtune.models.load import load_tokenizer, local_folder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEKKEN, GPT4O = GGUF_PRE_TOKENIZER_SPLITS["tekken"], GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]
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
        ("dbrx", {"pre_tokenizer": split(LLAMA3)}),
        ("tekken", {"pre_tokenizer": split(TEKKEN), "model": {"ignore_merges": True}}),
        ("gpt-4o", {"pre_tokenizer": split(GPT4O)}),
    ],
)
def test_the_way_of_cutting_is_known_by_its_rules(name: str, changes: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(**changes)
    assert vocabulary_of(tokenizer, 320, ENDING)["tokenizer.ggml.pre"] == name
    assert normalizes(tokenizer) == ("normalizer" in changes)
    assert cuts_by_capitals(tokenizer) == (name in ("tekken", "gpt-4o"))


CUT_ALIKE = [
    *TEXTS,
    "It's 3.14159, isn't it? I'LL SAY: they've",
    "  two spaces,\t\ttabs \n\n three  \r\n x/y/\n",
    "camelCaseWords HTTPServer",
    "店名：蓝门🍓，地址：磨坊巷4号。",
    "🥖👨\u200d👩\u200d👧🇨🇳 emoji; ñ é ü; Ελληνικά; русский 한국어 日本語",
    "1234567890 12,345.67 ½ Ⅷ",
]


WAYS_OF_CUTTING = {
    "qwen2": (QWEN2, False), "qwen35": (QWEN35, False), "llama-bpe": (LLAMA3, True), "dbrx": (LLAMA3, False),
    "tekken": (TEKKEN, True), "gpt-4o": (GPT4O, False),
}  # fmt: skip


def exported_with(name: str, folder: Path) -> tuple[Any, Path]:
    """A tokenizer that cuts in one of WAYS_OF_CUTTING, with a token that no merges lead to, and a file with it."""
    regex, ignore_merges = WAYS_OF_CUTTING[name]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split(regex)
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    trained.train_from_iterator(CUT_ALIKE * 3, trainer)
    content = json.loads(trained.to_str())
    content["model"] |= {"ignore_merges": ignore_merges}
    content["model"]["vocab"]["zyxw"] = len(content["model"]["vocab"])
    inner = Tokenizer.from_str(json.dumps(content))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    export(ExportConfig(base_model=str(folder / "model"), output_dir=str(folder / "out"), quantize=["f32"]))
    return tokenizer, folder / "out" / "out-f32.gguf"


@pytest.mark.parametrize("name", WAYS_OF_CUTTING)
def test_llama_cpp_and_what_is_read_back_cut_texts_alike(name: str, tmp_path: Path) -> None:
    tokenizer, path = exported_with(name, tmp_path)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*CUT_ALIKE, "zyxw"]]
    assert (len(wanted[-1]) == 1) == WAYS_OF_CUTTING[name][1]
    back = load_tokenizer(local_folder(find_model(str(path), None, "auto"), str(tmp_path)))
    assert [back(text, add_special_tokens=False)["input_ids"] for text in [*CUT_ALIKE, "zyxw"]] == wanted
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    found = [theirs.tokenize(text.encode(), add_bos=False, special=True) for text in [*CUT_ALIKE, "zyxw"]]
    assert found == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": split(r"\w+|\W+")}, r"not one that is known here .*w\+"),
        ({"pre_tokenizer": split(QWEN2, behavior="removed")}, "not one that is known"),
        ({"pre_tokenizer": split(QWEN2, invert=True)}, "not one that is known"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "not one that is known"),
        ({"pre_tokenizer": digits(False)}, "not one that is known"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "not one that is known"),
        ({"pre_tokenizer": split(TEKKEN)}, "ignore_merges is False, and True"),
        ({"pre_tokenizer": split(QWEN2), "model": {"ignore_merges": True}}, "ignore_merges is True, and False"),
        ({"normalizer": normalizers.Lowercase()}, "changes text first .Lowercase"),
        ({"decoder": decoders.ByteFallback()}, "its type is BPE; only BPE is supported, byte-level or SentencePiece's"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has no end_of_word_suffix"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        vocabulary_of(tokenizer_with(**changes), 320, ENDING)


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}, unk_token="a"), models.Unigram([("a", 0.0)], 0)])
def test_other_kinds_of_tokenizers_are_refused(model: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(UserError, match=r"its type is (WordLevel|Unigram)"):
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


# --- SentencePiece's BPE ---------------------------------------------------------------------------------------------

PHI3 = ["<|user|>", "<|end|>", "<|assistant|>"]


def phi3(change: Callable[[list[AddedToken]], None] = lambda _: None) -> Any:
    """As Phi-3-mini's: added tokens swallow the spaces after them, but for three."""
    tokenizer = pieces(normalizer=PREPEND)
    added = [AddedToken("</s>", rstrip=True, normalized=False), AddedToken("<|endoftext|>", special=True)]
    added += [AddedToken(text, rstrip=True, special=True) for text in PHI3]
    added += [AddedToken("<tool>", rstrip=True, normalized=False)]
    change(added)
    tokenizer.backend_tokenizer.add_tokens(added)
    return tokenizer


def test_llama_cpp_is_given_the_name_by_which_it_knows_phi3() -> None:
    assert swallows_spaces(phi3())
    assert vocabulary_of(phi3(), len(phi3()), Ending(2, [], 1, add_bos=True))
    for name, wanted in (("shop", "shop (Phi-3)"), ("my-Phi-3.5", "my-Phi-3.5"), ("phi3", "phi3")):
        assert name_in_file(phi3(), name) == wanted
    plain = pieces(normalizer=PREPEND)
    assert not swallows_spaces(plain)
    for name, wanted in (("shop", "shop"), ("not-Phi-3", "not-phi 3"), ("PHI3-phi-3", "phi 3-phi 3")):
        assert name_in_file(plain, name) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda added: added.pop(1),  # without <|endoftext|>, llama.cpp does not open the file
        lambda added: added.append(AddedToken("<|other|>", special=True)),  # which llama.cpp would have swallow
    ],
)
def test_other_tokens_that_swallow_spaces_are_refused_still(change: Callable[[list[AddedToken]], None]) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp has no rstrip of"):
        vocabulary_of(phi3(change), 500, Ending(2, [], 1, add_bos=True))


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
METASPACE = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
WAYS: dict[str, dict[str, Any]] = {
    "Llama 2": {"normalizer": PREPEND},
    "Llama 2, by Transformers 5": {"pre_tokenizer": METASPACE},
    "Gemma": {
        "normalizer": normalizers.Replace(" ", "▁"),
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
    },
}  # fmt: skip
WITH_SPACE = {"Llama 2", "Llama 2, by Transformers 5"}


def pieces(change: Any = None, **parts: Any) -> Any:
    """SentencePiece's BPE with pieces found in a few texts and, as Transformers makes it, every pair that gives one."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(TEXTS * 2, trainer)
    found = json.loads(trained.to_str())["model"]
    control, made = ["<unk>", "<s>", "</s>"], ["".join(pair) for pair in found["merges"]]
    letters = sorted(set(found["vocab"]) - set(made))
    vocabulary = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *dict.fromkeys(made)]
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    merges = [
        (piece[:place], piece[place:])
        for piece in dict.fromkeys(made)
        for place in range(1, len(piece))
        if piece[:place] in ids and piece[place:] in ids
    ]
    if change:
        change(ids, merges)
    inner = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(control)
    inner.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHATML
    return tokenizer


def put_together(text: str, written: dict[str, Any]) -> list[int]:
    """Tokens of a text without special ones, as llama.cpp finds them: of all neighbours that together are a token,
    those with the highest score are joined first, of several the leftmost; what remains unknown becomes bytes."""
    ids = {token: number for number, token in enumerate(written["tokenizer.ggml.tokens"])}
    scores = written["tokenizer.ggml.scores"]
    parts = [*(" " * written["tokenizer.ggml.add_space_prefix"] + text).replace(" ", "▁")]
    while pairs := [(-scores[ids[a + b]], n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]:
        _, n = min(pairs)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    known = [[ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts]
    return [number for numbers in known for number in numbers]


@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_put_together_by_their_scores_as_by_the_order_of_merges(way: str) -> None:
    tokenizer = pieces(**WAYS[way])
    rows = len(tokenizer) + 2
    written: Any = vocabulary_of(tokenizer, rows, Ending(2, [], 1, add_bos=True))
    assert written["tokenizer.ggml.model"] == "llama"
    assert written["tokenizer.ggml.add_space_prefix"] is (way in WITH_SPACE)
    assert spares_a_space(tokenizer) is (way == "Llama 2, by Transformers 5")
    assert not normalizes(tokenizer)
    kinds = written["tokenizer.ggml.token_type"]
    assert kinds[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert kinds[3:259] == [BYTE] * 256
    assert kinds[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert set(kinds[259:-3]) == {NORMAL}
    draw = random.Random(0)
    letters = "".join(TEXTS) + "    xyz🥖é\n"
    for _ in range(300):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 40))).lstrip(" ")
        text += draw.choice(TEXTS)
        assert put_together(text, written) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def late(ids: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Make a piece in a second way, long after the first."""
    left, right = next(pair for pair in merges if len(pair[0]) == 2 and left_out(pair, ids))
    ids[left[1] + right] = len(ids)
    merges += [(left[1], right), (left[0], left[1] + right)]


def left_out(pair: tuple[str, str], ids: dict[str, int]) -> bool:
    return pair[0][1] + pair[1] not in ids


def drop(ids: dict[str, int], merges: list[tuple[str, str]]) -> None:
    merges.pop()


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: pieces(late, normalizer=PREPEND), "is made at two places of the order of its merges"),
        (lambda: pieces(drop, normalizer=PREPEND), "does not put .* together, as llama.cpp would"),
        (lambda: pieces(lambda ids, _: ids.pop("<0x41>"), normalizer=PREPEND), "lacks bytes, such as <0x41>"),
        (lambda: pieces(normalizer=normalizers.NFKC()), "its normalizer or pre-tokenizer is not one that is known"),
        (
            lambda: pieces(pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)),
            "its normalizer or pre-tokenizer is not one that is known",
        ),
    ],
)
def test_pieces_that_llama_cpp_would_put_together_otherwise_are_refused(
    tokenizer: Callable[[], Any], reason: str
) -> None:
    made = tokenizer()
    with pytest.raises(UserError, match=reason):
        vocabulary_of(made, len(made) + 1, Ending(2, [], 1, add_bos=True))


@pytest.mark.parametrize("way", [*WAYS, "Phi-3"])
def test_llama_cpp_finds_the_same_tokens(way: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = phi3() if way == "Phi-3" else pieces(**WAYS[way])
    model = make_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), quantize=["f32"]))
    theirs = llama_cpp.Llama(str(tmp_path / "out" / "out-f32.gguf"), vocab_only=True, verbose=False)
    swallowed = ["<s> a<|user|>\n  b <|end|>\n<|assistant|> \t c</s> d", "<|user|>  ", "<tool> <|end|> <|endoftext|> x"]
    for text in [*TEXTS, "two  spaces 🥖\n\n", "<s>a b</s>c <tool>d", "x", *swallowed * (way == "Phi-3")]:
        found = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
