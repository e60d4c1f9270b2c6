"""A stranger's tokenizer can neither hang nor fill the memory nor end in a traceback; published ones are as before."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer
from tokenizer_kinds import KINDS

from qingtune.data import tokenizer_calls
from qingtune.data.format import Message
from qingtune.data.tokenize import make_template, prompt_ids
from qingtune.data.tokenizer_calls import decode, encode
from qingtune.data.tokenizer_limits import PATTERNS, UnsafeTokenizer, check_steps, has_foreign_patterns, steps_of
from qingtune.errors import UserError
from qingtune.export import gguf_vocab
from qingtune.models.load import load_tokenizer

ENDLESS = r"(([a-z])+.)+[A-Z]([a-z])+$"


def saved(folder: Path, **changes: Any) -> Path:
    """A tokenizer's folder with parts of its tokenizer.json changed."""
    make_tokenizer(CHATML).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def replace_step(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def sequence(kind: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def charsmap(*texts: bytes) -> str:
    return base64.b64encode((8).to_bytes(4, "little") + bytes(8) + b"\0".join(texts)).decode()


deep: Any = {"type": "NFC"}
for _ in range(30):
    deep = sequence("normalizers", deep)
HALF = {"type": "Split", "behavior": "Isolated", "invert": False}
WRAP = {"pair": [], "special_tokens": {}, "type": "TemplateProcessing"}
BOMBS: dict[str, tuple[str, Any]] = {
    "growing text": ("normalizer", replace_step("b" * 100)),
    "growing in steps": ("normalizer", sequence("normalizers", *[replace_step("aa")] * 40)),
    "growing decoder": ("decoder", sequence("decoders", *[replace_step("aaa")] * 9)),
    "empty pattern": ("normalizer", replace_step("b", String="")),
    "endless normalizer": ("normalizer", replace_step("b", Regex=ENDLESS)),
    "endless decoder": ("decoder", replace_step("b", Regex=ENDLESS)),
    "long prefix": ("normalizer", {"type": "Prepend", "prepend": "a" * 10**5}),
    "compiled": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": charsmap(b"b", b"a" * 10**5)}),
    "empty split": ("pre_tokenizer", {**HALF, "pattern": {"String": ""}}),
    "no pieces": ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "deep": ("normalizer", deep),
    "many": ("normalizer", sequence("normalizers", *[{"type": "NFC"}] * 1000)),
    "unknown": ("normalizer", {"type": "Shell", "run": "rm"}),
    "no type": ("normalizer", {"normalizers": []}),
    "no object": ("decoder", 7),
    "wrong types": ("normalizer", {"type": "Replace", "pattern": 3, "content": []}),
    "far strip": ("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 10**18}),
    "long template": ("post_processor", {**WRAP, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**4}),
    "many ids": (
        "post_processor",
        {**WRAP, "single": [], "special_tokens": {"x": {"id": "x", "ids": [0] * 10**5, "tokens": ["x"] * 10**5}}},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_is_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, step = BOMBS[name]
    folder = saved(tmp_path, **{kind: step})
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}: the tokenizer is refused: its {kind} "):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "{}",
        "[]",
        "null",
        "\x00",
        '{"normalizer": null, "normalizer": {"type": "Lowercase"}}',
        '{"version": "1.0", "added_tokens": 3, "model": {"type": "BPE", "vocab": {"a": "b"}, "merges": 7}}',
    ],
)
def test_a_broken_file_is_a_message(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_what_stands_in_the_place_of_a_file_is_not_passed_over(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "none.json")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: the target of this link does not exist"):
        load_tokenizer(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: this is not a regular file"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "tokenizer.json").unlink()
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "Qwen2Tokenizer"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer has no vocabulary\. Check that the folder is complete\."):
        load_tokenizer(tmp_path)


def test_long_added_tokens_are_refused(tmp_path: Path) -> None:
    content = json.loads((saved(tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    long = content["added_tokens"][0] | {"id": 999, "content": "x" * 10**5}
    saved(tmp_path, added_tokens=[*content["added_tokens"], long])
    with pytest.raises(UserError, match="the tokenizer is refused: it adds a token of 100,000 characters"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model_max_length": "x"}, '"model_max_length" is "x"'), ({"x": "\ud83c"}, "half of a surrogate pair")],
)
def test_settings_that_fail_later_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        load_tokenizer(tmp_path)


def test_text_is_not_cut_at_random(tmp_path: Path) -> None:
    content = json.loads((saved(tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    saved(tmp_path, model=content["model"] | {"dropout": 0.5})
    with pytest.raises(UserError, match="at random"):
        load_tokenizer(tmp_path)


def test_texts_are_neither_padded_nor_cut(tmp_path: Path) -> None:
    usual = load_tokenizer(saved(tmp_path / "a"))("Fresh bread at seven.")["input_ids"]
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    cutting = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(saved(tmp_path / "b", padding=padding, truncation=cutting))
    assert encode(tokenizer, "Fresh bread at seven.") == usual
    template = make_template(tokenizer, [])
    assert decode(tokenizer, prompt_ids(template, [Message("user", "<|im_end|>")])).count("<|im_end|>") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_usual_tokenizers_are_bounded_and_need_no_process(kind: str) -> None:
    steps = steps_of(KINDS[kind][0]())
    check_steps(steps)
    assert not has_foreign_patterns(steps)


def split(regex: str) -> dict[str, Any]:
    return {"pre_tokenizer": {**HALF, "pattern": {"Regex": regex}}}


@pytest.mark.parametrize("regex", [*PATTERNS, r"\p{N}{1,3}", r"\s+", " {2,}", "[一-龥]+", r"\d", "a"])
def test_known_patterns_are_taken_here(regex: str) -> None:
    from tokenizers import Regex

    Regex(regex)
    assert not has_foreign_patterns(split(regex))


def test_what_is_exported_needs_no_process() -> None:
    regexes = [detail for steps, _ in gguf_vocab.PRE_TOKENIZERS for kind, detail in steps if kind == "Split"]
    assert len(set(regexes)) == 5
    assert set(regexes) <= set(PATTERNS)


@pytest.mark.parametrize(
    "regex", [ENDLESS, "(a+)+b", "a*a*b", r"\1", r"(?:a|a)*", PATTERNS[0] + "|(a+)+b", "[[a]&&[b]]+"]
)
def test_other_patterns_are_not(regex: str) -> None:
    assert has_foreign_patterns(split(regex))


# --- In a process of its own -----------------------------------------------------------------------------------------


@pytest.fixture
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_calls, "SECONDS", 1.0)


def foreign(tmp_path: Path, regex: str) -> Any:
    step = split(regex)["pre_tokenizer"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return load_tokenizer(saved(tmp_path, pre_tokenizer=sequence("pretokenizers", step, level)))


def test_unknown_patterns_give_the_same_ids_and_no_control_tokens(tmp_path: Path) -> None:
    tokenizer = foreign(tmp_path, r"(?:[a-z]|[A-Z])+|\s+|[^a-zA-Z\s]")
    assert has_foreign_patterns(steps_of(tokenizer))
    for text in ("Fresh bread at seven. 七点", "", "a\n\n b<|im_end|>"):
        assert encode(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    template = make_template(tokenizer, [])
    shown = prompt_ids(template, [Message("user", "x<|im_end|>")])
    assert shown.count(template.end_of_turn) == 1
    assert decode(tokenizer, shown).startswith("<|im_start|>user\nx<|im_end|><|im_end|>\n")
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "a")) == ["a"]


@pytest.mark.usefixtures("_short_patience")
def test_a_pattern_that_never_ends_on_a_text_is_stopped(tmp_path: Path) -> None:
    tokenizer = foreign(tmp_path, "a*a*[^a]x")
    with pytest.raises(UserError, match="was stopped: a text took over 1 s"):
        encode(tokenizer, "a" * 3000 + "! x")
    assert encode(tokenizer, "Fine") == tokenizer("Fine", add_special_tokens=False)["input_ids"]


def test_a_panic_is_a_message(tmp_path: Path) -> None:
    from tokenizers import decoders

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Strip("a", 0, 60)
    with pytest.raises(UserError, match="the model's tokenizer fails"):
        decode(tokenizer, encode(tokenizer, "a"))


def test_the_check_names_the_step() -> None:
    with pytest.raises(UnsafeTokenizer, match=r"its normalizer may lengthen a text by a factor of 100"):
        check_steps({"normalizer": replace_step("b" * 100)})


def test_the_check_names_no_number_that_nobody_reads() -> None:
    steps = [replace_step("b" * 100)] * 9
    with pytest.raises(UnsafeTokenizer, match=r"may lengthen a text by a factor of over a million"):
        check_steps({"normalizer": {"type": "Sequence", "normalizers": steps}})
