"""Decoding gives what Transformers' own generate gives; answers keep their promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from tiny_runs import lively_model

from qingtune.answering.generate import Answer, Decoding, choose, generate
from qingtune.answering.load import ModulesDecoder
from qingtune.data.tokenize import Template, make_template

NEVER: frozenset[int] = frozenset()
KINDS = ["qwen2", "qwen3", "llama", "gpt2", "mistral"]
PROMPT = [5, 17, 200, 3, 42, 42, 99, 310]


def decode(model: Any, **settings: Any) -> list[int]:
    return list(generate(ModulesDecoder(model), PROMPT, Decoding(**{"max_new_tokens": 24} | settings), NEVER))


def transformers_greedy(model: Any, **settings: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0,
        **settings,
    )  # fmt: skip
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers(kind: str, penalty: float) -> None:
    model = lively_model(kind)
    mine = decode(model, temperature=0, repetition_penalty=penalty)
    assert mine == transformers_greedy(model, repetition_penalty=penalty)
    assert len(set(mine)) > 2


def test_penalty_and_seed_have_an_effect() -> None:
    model = lively_model("qwen2")
    assert decode(model, temperature=0) != decode(model, temperature=0, repetition_penalty=1.3)
    draws = [decode(model, temperature=1.0, top_k=0, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 0, "top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrowest_sampling_is_greedy(settings: dict[str, Any]) -> None:
    model = lively_model("llama")
    assert decode(model, **{"temperature": 1.0} | settings) == decode(model, temperature=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 4, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.5},
    ],
)
def test_draws_follow_transformers_probabilities(settings: dict[str, Any]) -> None:
    from transformers import generation

    logits = torch.randn(10, generator=torch.Generator().manual_seed(4)) * 1.5
    seen = torch.tensor([int(logits.argmax()), int(logits.argmin())])
    scores = logits[None].clone()
    steps: list[Any] = [generation.RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0))]
    steps.append(generation.TemperatureLogitsWarper(settings["temperature"]))
    steps += [generation.TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    steps += [generation.TopPLogitsWarper(settings["top_p"])] if settings["top_p"] < 1 else []
    for step in steps:
        scores = step(seen[None], scores)
    wanted = scores.softmax(1)[0]
    generator, count = torch.Generator().manual_seed(0), 3000
    drawn = torch.tensor([choose(logits, seen, Decoding(**settings), generator) for _ in range(count)])
    shares = torch.bincount(drawn, minlength=10) / count
    assert not bool(shares[wanted == 0].any())  # what top_k and top_p rule out never comes
    assert float((shares - wanted).abs().max()) < 0.03  # over three standard errors of a share


def test_the_likeliest_token_stays_however_small_top_p_is() -> None:
    logits, seen = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0])
    decoding = Decoding(temperature=1, top_p=1e-300, top_k=0)
    assert {choose(logits, seen, decoding, torch.Generator().manual_seed(seed)) for seed in range(20)} == {1}


def test_stops_at_stop_id_and_yields_it() -> None:
    model = lively_model("qwen2")
    free = decode(model, temperature=0)
    stop = free[7]
    first = free.index(stop)
    found = list(
        generate(ModulesDecoder(model), PROMPT, Decoding(max_new_tokens=24, temperature=0), frozenset({stop, 319}))
    )
    assert found == free[: first + 1]


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(make_tokenizer(), [2])


TEXT = "龙🐉ábc👩‍👩‍👧 终 …"  # characters of one to four bytes, each byte a token


def test_answer_comes_in_whole_characters(template: Template) -> None:
    ids: list[int] = template.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(TEXT) + 10
    shown: list[str] = []
    after: list[str] = []

    def tokens() -> Iterator[int]:
        for token in [*ids, 2]:
            after.append("".join(shown))
            yield token

    answer = Answer(template, tokens())
    for piece in answer:
        assert piece
        assert "\ufffd" not in piece
        shown.append(piece)
    assert "".join(shown) == answer.text == TEXT
    assert answer.ended
    assert answer.tokens == [*ids, 2]
    # Nothing is held back longer than it must: before each token, every whole character so far was shown.
    for count, text in enumerate(after):
        whole = template.tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert text == whole


def test_answer_cut_within_a_character_loses_nothing_before_it(template: Template) -> None:
    ids: list[int] = template.tokenizer("ab龙", add_special_tokens=False)["input_ids"]
    answer = Answer(template, ids[:-1])
    assert "".join(answer) == answer.text
    assert answer.text.rstrip("\ufffd") == "ab"
    assert not answer.ended
