"""Control tokens at which texts are cut: none that another added token could swallow, however many there are."""

from __future__ import annotations

import random

from qingtune.data.encoder import _covered


def could_hold(token: str, text: str) -> bool:
    """Whether a token could be found in a text so that it holds the beginning of another."""
    return token != text and (text in token or any(token.endswith(text[:end]) for end in range(1, len(text))))


def test_covered_texts_are_those_of_comparing_each_with_each() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        tokens = ["".join(draw.choices("ab<", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 6))]
        texts = tokens[: draw.randint(1, len(tokens))]
        assert _covered(texts, tokens) == {text for text in texts if any(could_hold(token, text) for token in tokens)}


def test_thousands_of_tokens_are_compared_at_once() -> None:
    tokens = [f"<|extra_{number}|>" for number in range(20_000)]
    assert _covered(tokens, tokens) == set()


def test_where_tokens_are_very_long_no_text_is_cut() -> None:
    assert _covered(["<a>"], ["<a>", "x" * 20_000]) == {"<a>"}
