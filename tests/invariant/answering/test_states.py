"""Gated delta nets in the cache: what slots hold is reused where their states allow it, and answers are those of a
fresh decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from tiny_runs import lively

from qingtune.answering.decoder import cache
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.load import load_decoder
from qingtune.kernels.device import Hardware

FP32 = Hardware(torch.device("cpu"), torch.float32, "")
SYSTEM = [5, 17, 200, 3, 42, 42, 99, 310]
ONE, TWO, THREE = ([*SYSTEM, *range(start, start + 10)] for start in (50, 150, 250))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3.5")
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, tie_word_embeddings=True,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    lively(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the length of each part of a prompt that is computed."""
    monkeypatch.setattr(cache, "LAST_TOKENS", 2)
    read: list[int] = []
    right = CachedDecoder._read_chunk  # pyright: ignore[reportPrivateUsage]

    def counted(self: CachedDecoder, ids: Sequence[int], slot: int) -> torch.Tensor:
        read.append(len(ids))
        return right(self, ids, slot)

    monkeypatch.setattr(CachedDecoder, "_read_chunk", counted)
    return read


def opened(folder: Path, slots: int = 1) -> CachedDecoder:
    decoder = load_decoder(folder, None, None, FP32, None, slots)
    assert isinstance(decoder, CachedDecoder)
    return decoder


Check = Callable[[CachedDecoder, Sequence[int], int, list[int]], None]


@pytest.fixture
def check(folder: Path, read: list[int]) -> Check:
    """Start a slot: its logits are those of a fresh decoder, and parts of these lengths are read."""
    return functools.partial(_check, folder, read)


def _check(
    folder: Path, read: list[int], decoder: CachedDecoder, ids: Sequence[int], slot: int, wanted: list[int]
) -> None:
    read.clear()
    found = decoder.start(ids, slot)
    assert read == wanted
    fresh = opened(folder).start(ids)
    assert float((found - fresh).abs().max() / fresh.abs().max()) < 1e-4


def test_a_chats_next_turn_reads_only_what_is_new(folder: Path, check: Check) -> None:
    decoder = opened(folder)
    check(decoder, ONE, 0, [15, 3])  # states are kept before the last tokens
    decoder.step([8])
    decoder.step([9])
    check(decoder, [*ONE, 8, 9, 70, 71], 0, [2])  # the answer is in the next prompt as it was given
    check(decoder, [*ONE[:-1], 80, 81, 82, 83, 84], 0, [4, 3])  # without what began the answer


def test_what_prompts_begin_with_is_read_twice_and_then_reused(folder: Path, check: Check) -> None:
    decoder = opened(folder, 3)
    check(decoder, ONE, 0, [15, 3])
    check(decoder, TWO, 1, [8, 7, 3])  # where it leaves the other one, states are kept, too
    check(decoder, THREE, 2, [7, 3])
    check(decoder, TWO, 0, [3])
    for found, ids in zip(decoder.step([7, 7, 7]), (TWO, TWO, THREE), strict=True):
        fresh = opened(folder)
        fresh.start(ids)
        wanted = fresh.step([7])[0]
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_a_moved_slot_goes_on(folder: Path, check: Check) -> None:
    decoder = opened(folder, 2)
    decoder.start(ONE, 0)
    decoder.start(TWO, 1)
    decoder.move(1, 0)
    fresh = opened(folder)
    fresh.start(TWO)
    assert torch.allclose(decoder.step([7])[0], fresh.step([7])[0], atol=1e-4)
    check(decoder, [*TWO, 7, 8], 0, [1])


def test_few_states_are_kept_and_counted(folder: Path, read: list[int]) -> None:
    decoder = opened(folder)
    held = decoder._cache  # pyright: ignore[reportPrivateUsage]
    for turns in range(1, 5):
        decoder.start(ONE * turns)
        assert len(held.kept[0]) <= cache.KEPT_STATES
    assert read
    kept = [tensor for states in held.kept[0].values() for tensor in states]
    parts = [held.rows, held.states, *kept]
    length = held.keys.shape[3]
    keys = 2 * held.keys.numel() * held.keys.itemsize
    assert decoder.slot_bytes(length) == keys + sum(part.numel() * part.itemsize for part in parts)
