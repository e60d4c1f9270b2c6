"""Answering a file takes as many prompts at a time as there is memory for their keys and values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

from qingtune.answering import speaker
from qingtune.answering.answer_file import Question
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.generate import Decoding
from qingtune.answering.load import load_decoder
from qingtune.commands import infer as inference
from qingtune.config.commands import InferConfig
from qingtune.errors import UserError
from qingtune.kernels.device import Hardware

# Layers, keys and values, heads of them, head size, bytes of an fp32 number; the tiny model reads 256 tokens.
A_TOKEN = 2 * 2 * 2 * 8 * 4
A_SLOT = 190 * A_TOKEN  # of the longest question


def decoder_of(folder: Path, slots: int = 16) -> CachedDecoder:
    fp32 = Hardware(torch.device("cpu"), torch.float32, "")
    decoder = load_decoder(folder, None, None, fp32, None, slots)
    assert isinstance(decoder, CachedDecoder)
    return decoder


def questions(prompts: list[int], answer: int) -> list[Question]:
    return [Question({}, [5] * length, Decoding(max_new_tokens=answer)) for length in prompts]


def free(monkeypatch: pytest.MonkeyPatch, slots: float | None) -> None:
    """Let there be just enough free memory for so many slots."""
    count = None if slots is None else int(slots * A_SLOT / inference.CACHE_OF_FREE) + 1
    monkeypatch.setattr(inference, "free_bytes", lambda _: count)


@pytest.mark.parametrize(("slots", "taken"), [(100, 16), (16, 16), (15.9, 15), (3, 3), (1, 1), (None, 16)])
def test_slots_are_those_that_fit(
    slots: float | None,
    taken: int,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decoder = decoder_of(tiny())
    capsys.readouterr()  # the bars of a model that is written for the first time
    free(monkeypatch, slots)
    inference._fit_slots(decoder, questions([3, 90, 40], 100), "p.jsonl")
    assert decoder.slots == taken
    told = capsys.readouterr().err
    assert (f"Memory: {taken} instead of 16 prompts at a time" in told) == (taken < 16)
    assert told.count("\n") == (taken < 16)
    if slots is not None:
        keys, values = decoder._cache.keys, decoder._cache.values
        assert keys.nbytes + values.nbytes == taken * A_SLOT
        decoder.start([5] * 190)
        assert decoder._cache.keys is keys  # all that was counted was taken at once


def test_what_a_slot_takes_is_what_the_cache_holds(tiny: Callable[..., Path]) -> None:
    decoder = decoder_of(tiny(), slots=3)
    for length in (1, 100, 256):
        decoder.make_slots(3, length)
        cache = decoder._cache
        assert 3 * decoder.slot_bytes(length) == cache.keys.nbytes + cache.values.nbytes


def test_a_single_prompt_that_does_not_fit_is_told_with_what_would(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny())
    free(monkeypatch, 0.5)
    with pytest.raises(
        UserError, match=r"p\.jsonl, prompt 2: keys and values of the prompt's 90 tokens and of up"
    ) as e:
        inference._fit_slots(decoder, questions([3, 90, 40], 100), "p.jsonl")
    assert "Use --max_new_tokens 5 or less" in str(e.value)  # half a slot of 190 tokens
    inference._fit_slots(decoder, questions([3, 90, 40], 5), "p.jsonl")
    assert decoder.slots == 1
    free(monkeypatch, 0.1)
    with pytest.raises(UserError, match=r"Use prompts of less than 19 tokens"):
        inference._fit_slots(decoder, questions([3, 90, 40], 100), "p.jsonl")


def test_answers_do_not_depend_on_the_slots(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": f"Write {'a post ' * (n % 5)}{n}."} for n in range(12)]
    prompts = write_jsonl(tmp_path / "p.jsonl", rows)
    answers: list[list[str]] = []
    monkeypatch.setattr(speaker, "choose_hardware", lambda: Hardware(torch.device("cpu"), torch.float32, ""))
    for slots in (None, 2):
        if slots:
            monkeypatch.setattr(inference, "free_bytes", lambda _, slots=slots: int(slots * A_SLOT / 0.8) + 1)
        output = tmp_path / f"{slots}.jsonl"
        inference.infer(
            InferConfig(
                base_model=str(tiny()),
                prompt_file=str(prompts),
                output_file=str(output),
                max_new_tokens=6,
                temperature=0,
            )
        )
        answers.append([json.loads(line)["answer"] for line in output.read_text(encoding="utf-8").splitlines()])
    assert "instead of 12 prompts at a time" in capsys.readouterr().err
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
