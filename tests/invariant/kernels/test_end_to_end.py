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

from qingtune.config.training import TrainConfig
from qingtune.data.batch import collate
from qingtune.data.tokenize import Sample
from qingtune.kernels import loss
from qingtune.kernels.attention import use_end_to_end
from qingtune.kernels.device import Hardware
from qingtune.kernels.loss import summed_loss
from qingtune.training.engine import Engine, make_engine


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


# --- The engine for general architectures ----------------------------------------------------------------------------


def general_engine(model: Any, **settings: Any) -> Engine:
    values = {"model_name_or_path": "model", "data_path": "data.jsonl", "output_dir": "output", **settings}
    hardware = Hardware(torch.device("cpu"), torch.float32, "for tests")
    return make_engine(TrainConfig.model_validate(values), model, hardware, 17)


def test_a_general_model_holds_the_graph_of_one_sample_and_the_logits_of_its_predicting_rows() -> None:
    model, events = lively_model("gemma2"), list[str]()
    assert model.config.final_logit_softcapping == 30.0
    batch = collate(make_samples())

    def note_logits(_module: Any, _inputs: Any, logits: torch.Tensor) -> None:
        events.append(f"{logits.shape[1]} rows")
        logits.register_hook(lambda _: events.append("backward"))

    model.lm_head.register_forward_hook(note_logits)
    general_engine(model).add_gradients(batch, torch.tensor(0.25))
    assert events == ["5 rows", "backward", "16 rows", "backward", "2 rows", "backward", "1 rows", "backward"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_gradients_of_a_general_model_are_those_of_the_padded_batch(kind: str, checkpointing: bool) -> None:
    model, samples = lively_model(kind), make_samples()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    wanted = plain_loss(plain, samples)
    (wanted * 0.25).backward()
    engine = general_engine(model.train(), gradient_checkpointing=checkpointing)
    found = engine.add_gradients(collate(samples), torch.tensor(0.25))
    assert float(found) == pytest.approx(wanted.item(), rel=1e-6)
    assert float(engine.loss(collate(samples))) == pytest.approx(wanted.item(), rel=1e-6)
    assert_close(gradients(model), gradients(plain), share=1e-4)


def test_a_model_whose_forward_takes_no_rows_gives_all_logits() -> None:
    class Plain(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    model, batch = lively_model("gemma2"), collate(make_samples())
    with torch.no_grad():
        losses = [float(summed_loss(one, batch, end_to_end=False)) for one in (model, Plain(model))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
