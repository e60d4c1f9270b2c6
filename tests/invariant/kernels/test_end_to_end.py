"""Samples laid end to end give what they give one by one: the loss and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_model
from tiny_runs import assert_close, lively, lively_model, make_samples

from qingtune.config.training import TrainConfig
from qingtune.data.batch import collate
from qingtune.data.tokenize import Sample
from qingtune.kernels import footprint
from qingtune.kernels.device import Hardware
from qingtune.kernels.end_to_end import changes_logits, try_ways
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


def assert_same_as_plain(model: Any, *, one_by_one: str | None, plain_head: bool) -> None:
    """A general model's losses and gradients are Transformers' own of a padded batch, in the ways that were found."""
    plain, samples = copy.deepcopy(model), make_samples()
    plain.set_attn_implementation("eager")
    wanted = plain_loss(plain, samples)
    wanted.backward()
    found = try_ways(model, 1e-3)
    assert (found.one_by_one is None) == (one_by_one is None)
    assert (one_by_one or "") in (found.one_by_one or "")
    assert found.plain_head == plain_head == (not changes_logits(model.config))
    batch = collate(samples)
    parts = batch.trained_samples() if found.one_by_one else [batch]
    total = torch.stack([summed_loss(model, part, plain_head=found.plain_head) for part in parts]).sum()
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_close(gradients(model), gradients(plain), share=1e-4)


SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
LOGITS = "its logits are more than a product with its head"
# Why one by one (None: end to end), whether the head is a plain product, and what is not the default.
GENERAL: dict[str, tuple[str | None, bool, dict[str, Any]]] = {
    "qwen2": (None, True, {}),
    "olmo2": (None, True, {}),
    "olmo3": (None, True, {"sliding_window": 4}),
    "starcoder2": (None, True, {"sliding_window": 4}),
    "granite": (LOGITS, False, {"logits_scaling": 3.0}),
    "cohere": (LOGITS, False, {}),
    "vaultgemma": (LOGITS, False, {"head_dim": 8}),
    "opt": ("change each other's logits", True, {"word_embed_proj_dim": 32, "ffn_dim": 48, "enable_bias": False}),
    "bloom": ("takes no positions", True, {}),
    "qwen3_next": ("not attention (linear_attention)", True, {**DELTA, "num_experts": 0}),
}


@pytest.mark.parametrize("kind", GENERAL)
def test_losses_of_a_general_model_are_those_of_the_padded_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "HEAD_TILE", 70)
    one_by_one, plain_head, changes = GENERAL[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = lively(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert_same_as_plain(model, one_by_one=one_by_one, plain_head=plain_head)


def test_gpt2_lies_end_to_end() -> None:
    assert_same_as_plain(lively_model("gpt2"), one_by_one=None, plain_head=True)


def test_what_an_architecture_refuses_end_to_end_is_computed_one_by_one() -> None:
    model = lively_model("qwen2")
    inner = model.forward

    def forward(position_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        if position_ids is not None:
            raise ValueError("positions must rise")
        return inner(**inputs)

    model.forward = forward
    assert try_ways(model, 1e-3).one_by_one == "concatenated samples failed (positions must rise)"


def test_a_soft_cap_that_small_logits_do_not_show_is_seen() -> None:
    model = make_model("qwen2", initializer_range=1e-4)
    assert try_ways(model, 1e-3).plain_head
    inner = model.forward

    def capped(**inputs: Any) -> Any:
        output = inner(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    assert not try_ways(model, 1e-3).plain_head


def test_trying_leaves_training_mode_and_gradients_as_they_were() -> None:
    model = lively_model("qwen2").train()
    try_ways(model, 1e-3)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_neighbours_do_not_matter() -> None:
    model, samples = lively_model("llama"), make_samples()
    with torch.no_grad():
        trained = [sample for sample in samples if sample.trained_tokens]
        alone = [summed_loss(model, collate([sample]), plain_head=True) for sample in trained]
        together = summed_loss(model, collate(samples[::-1]), plain_head=True)
    assert together.item() == pytest.approx(float(sum(alone)), rel=1e-6)


# --- The engine for general architectures ----------------------------------------------------------------------------


def general_engine(model: Any, **settings: Any) -> Engine:
    values = {"model_name_or_path": "model", "data_path": "data.jsonl", "output_dir": "output", **settings}
    hardware = Hardware(torch.device("cpu"), torch.float32, "for tests")
    return make_engine(TrainConfig.model_validate(values), model, hardware, 17)


def test_a_general_model_holds_the_graph_of_one_sample_and_the_logits_of_its_predicting_rows() -> None:
    model, events = lively_model("vaultgemma"), list[str]()
    assert model.config.final_logit_softcapping == 30.0
    engine, batch = general_engine(model), collate(make_samples())

    def note_logits(_module: Any, _inputs: Any, logits: torch.Tensor) -> None:
        events.append(f"{logits.shape[1]} rows")
        logits.register_hook(lambda _: events.append("backward"))

    model.lm_head.register_forward_hook(note_logits)
    engine.add_gradients(batch, torch.tensor(0.25))
    assert events == ["5 rows", "backward", "16 rows", "backward", "2 rows", "backward", "1 rows", "backward"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["olmo2", "vaultgemma"])
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

    model, sample = lively_model("vaultgemma"), collate(make_samples()[:1])
    with torch.no_grad():
        losses = [float(summed_loss(one, sample, plain_head=False)) for one in (model, Plain(model))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
