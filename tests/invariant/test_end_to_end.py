"""Samples laid end to end give what they give one by one: the loss and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from tiny_runs import assert_close, lively, lively_model, make_samples

from qingtune.data.batch import collate
from qingtune.data.tokenize import Sample
from qingtune.kernels import loss
from qingtune.kernels.attention import use_end_to_end
from qingtune.kernels.loss import summed_loss


def plain_loss(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Transformers alone: one padded batch with a mask, labels of -100 where nothing is trained."""
    longest = max(len(sample.token_ids) for sample in samples)
    ids, labels = torch.zeros(len(samples), longest).long(), torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest).long()
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        ids[row, :length] = torch.from_numpy(sample.token_ids)
        labels[row, :length] = torch.where(torch.from_numpy(sample.trained), ids[row, :length], -100)
        mask[row, :length] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def assert_same_as_plain(model: Any, *, end_to_end: bool) -> None:
    plain, samples = copy.deepcopy(model), make_samples()
    plain.set_attn_implementation("eager")
    wanted = plain_loss(plain, samples)
    wanted.backward()
    found = summed_loss(model, collate(samples), end_to_end=end_to_end)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_close(gradients(model), gradients(plain), share=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gpt2"])
def test_end_to_end_equals_padded_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 320 * 7)  # the head's loss in chunks of 7 trained tokens
    model = lively_model(kind)
    assert use_end_to_end(model) is None
    assert_same_as_plain(model, end_to_end=True)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_one_by_one_equals_padded_batch(kind: str) -> None:
    assert_same_as_plain(lively_model(kind), end_to_end=False)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_unchecked_architectures_go_one_by_one(kind: str) -> None:
    model = lively_model(kind)
    reason = use_end_to_end(model)
    assert reason is not None
    assert kind in reason
    assert_same_as_plain(model, end_to_end=False)


def test_sliding_window_of_a_checked_architecture_goes_one_by_one() -> None:
    model = lively(make_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1))
    reason = use_end_to_end(model)
    assert reason is not None
    assert "sliding_attention" in reason
    assert_same_as_plain(model, end_to_end=False)


def test_neighbours_do_not_matter() -> None:
    model = lively_model("llama")
    use_end_to_end(model)
    samples = make_samples()
    with torch.no_grad():
        alone = [summed_loss(model, collate([sample]), end_to_end=True) for sample in samples if sample.trained_tokens]
        together = summed_loss(model, collate(samples[::-1]), end_to_end=True)
    assert together.item() == pytest.approx(float(sum(alone)), rel=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_switching_leaves_ordinary_use_as_it_was(kind: str) -> None:
    model = lively_model(kind)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use_end_to_end(model)
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
