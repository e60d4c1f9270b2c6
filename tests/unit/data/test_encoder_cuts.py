"""Control tokens at which texts are cut: the template's own that no other added token could swallow."""

from __future__ import annotations

import random
from typing import Any

from conftest import CHATML, make_tokenizer

from qingtune.data.encoder import MOST_CUTS, _covered
from qingtune.data.format import Message
from qingtune.data.tokenize import make_template, prompt_ids


def could_hold(token: str, text: str) -> bool:
    """Whether a token could be found in a text so that it holds the beginning of another."""
    return (text in token and token != text) or any(token.endswith(text[:end]) for end in range(1, len(text)))


def test_covered_texts_are_those_of_comparing_each_with_each() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        tokens = {"".join(draw.choices("ab<", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 6))}
        texts = draw.sample(sorted(tokens), draw.randint(1, len(tokens)))
        assert _covered(texts, tokens) == {text for text in texts if any(could_hold(token, text) for token in tokens)}


def with_thousands(chat_template: str) -> Any:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_tokens([AddedToken(f"<e{n}>", special=True, normalized=False) for n in range(5000)])
    return make_template(tokenizer, [2])


def test_of_thousands_of_control_tokens_those_of_the_template_cut_texts() -> None:
    usual, template = make_template(make_tokenizer(), [2]), with_thousands(CHATML)
    turns = [Message("user", "a <e1 <|im_end|> b")]
    assert len(template.encoder.cuts("<|im_start|>user\n<e7><|im_end|>\n<|im_start|>")) == 3
    assert prompt_ids(template, turns) == prompt_ids(usual, turns)
    forged = template.tokenizer.convert_tokens_to_ids("<e7>")
    assert forged not in prompt_ids(template, [Message("user", "a<e7>b")])
    assert forged in template.tokenizer("a<e7>b")["input_ids"]


def test_a_template_that_names_thousands_is_cut_at_a_few() -> None:
    template = with_thousands(CHATML + "{# " + " ".join(f"<e{n}>" for n in range(5000)) + " #}")
    assert len(template.encoder.cuts("".join(f"<e{n}>a" for n in range(5000)))) <= MOST_CUTS
    assert prompt_ids(template, [Message("user", "a")])
