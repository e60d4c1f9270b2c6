"""Expressions of strangers mean what they mean to PEFT, and none takes long."""

from __future__ import annotations

import random
import re
import time

import pytest

from qingtune.config.patterns import MOST_CHARACTERS, PatternError, parse_pattern

NAMES = [
    *(f"model.layers.{number}.self_attn.{part}" for number in (0, 1, 10, 23) for part in ("q_proj", "k_proj")),
    "model.layers.3.mlp.up_proj", "lm_head", "a.b", "aa", "a",
]  # fmt: skip
KEYS = [
    "q_proj", "self_attn.q_proj", r"layers\.\d+\.mlp.*", "^model.*q_proj", r"(q|k)_proj", r"layers\.(1|2)\..*",
    r"layers\.[0-9]{1,2}\.self_attn\.[qkv]_proj", r".*_proj$", "(a|b)+", "(a*)*", "(a+)+", "[^.]+", "a{,2}", "a{2}",
    "x{}", "a{", "a?b??", r"\w+\.\w+", ".*.*.*", "", "()", "|a", "(?P<x>q)_proj", "[]a]", "[^]a]+", r"\Amodel.*\Z",
    "[[a]", "[a&&b]_?", "[a~~b]", r"[\[a]", "[&a]", r"a\.b", r"lm\_head", "a|model.*", "a{,}",
    r"[\w.]+", r"[^\d]+", r"\W\D+", r"[\S\]]+", r"[\W]b", "a{1,}?", "(?:a|(?:b))",
]  # fmt: skip
PIECES = [
    "a", "b", ".", r"\.", "(", "(?:", ")", "|", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "[ab]", "[^a]", r"\d",
    "{", "}", "x", "]", "{x}", "*?", "+?",
]  # fmt: skip


def by_peft(key: str, name: str) -> bool:
    """peft.utils.other.get_pattern_key's rule."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # classes that Python may read otherwise one day
@pytest.mark.parametrize("key", KEYS)
def test_a_key_means_what_it_means_to_peft(key: str) -> None:
    assert [parse_pattern(key)(name) for name in NAMES] == [by_peft(key, name) for name in NAMES]


def test_random_keys_mean_what_they_mean_to_peft() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab.x1{}]", k=draw.randint(1, 8))) for _ in range(60)]
    followed = 0
    for _ in range(2000):
        key = "".join(draw.choices(PIECES, k=draw.randint(1, 7)))
        try:
            pattern = parse_pattern(key)
        except PatternError:
            continue
        followed += 1
        for text in draw.sample(texts, 10):
            assert pattern(text) == by_peft(key, text), (key, text)
    assert followed > 500


@pytest.mark.parametrize(
    "key",
    [
        r"(([a-z_0-9]+)+\.?)+!",
        ".*.*.*.*.*.*.*.*=",
        "(a|a|.|.)*!",
        "(.*a){100}",
        "([a-z_0-9.]{1,10}){1,10}!",
        "(a*|a*|a*|a*){99}!",
    ],
)
def test_a_bomb_takes_no_time(key: str) -> None:
    """A matcher that tries one way after the other would take years over the first name."""
    pattern, began = parse_pattern(key), time.process_time()
    assert not any(pattern(f"model.layers.{number}.self_attn.q_proj.{'a' * 60}") for number in range(30))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("(" * 200, "unterminated"),
        ("((((((){100}){100}){100}){100}){100}){100}", "too many"),
        ("a{4000}", "too many"),
        ("(" + "|".join(["a*"] * 80) + "){100}", "too many"),
        ("a" * (MOST_CHARACTERS + 1), "characters"),
        ("(?=a)", "not understood"),
        ("(?P=x)", "not understood"),
        ("[a--b]", "not understood"),
        ("a*+", "not understood"),
        ("a{2}+", "not understood"),
        (r"(a)\1", "not understood"),
        (r"\bq_proj", "not understood"),
        ("(?i)a", "not understood"),
        ("[a", "not understood"),
        ("[z-a]", "bad character range"),
        ("a**", "not understood"),
        ("a*{2}", "multiple repeat"),
        ("*a", "nothing to repeat"),
        ("^*a", "nothing to repeat"),
        ("a{3,1}", "min repeat greater than max repeat"),
        (")", "unbalanced"),
        ("(a", "unterminated"),
    ],
)
def test_what_is_not_followed_is_refused_with_its_reason(key: str, why: str) -> None:
    with pytest.raises(PatternError, match=why):
        parse_pattern(key)
