"""Which kernels a model gets, with the reason told; how many layers are computed again for want of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, reporting
from decoders import LONGROPE
from mixtures import make_mixture

from qingtune.adapters.lora import add_lora, member
from qingtune.adapters.variants import Variant
from qingtune.config.training import TrainConfig
from qingtune.data.batch import Batch, collate, split_evenly
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError
from qingtune.kernels.decoder import TrainingDecoder, why_not
from qingtune.kernels.device import Hardware
from qingtune.kernels.end_to_end import why_samples_would_mix
from qingtune.kernels.native import elementwise as in_c
from qingtune.kernels.units import Whole
from qingtune.models.layers import BALANCE
from qingtune.training import engine
from qingtune.training.engine import make_engine
from qingtune.training.shards import why_not_sharded

CPU = Hardware(torch.device("cpu"), torch.float32, "for tests")
LAYERS, TOKENS = 4, 100


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"model_name_or_path": "model", "data_path": "data.jsonl", "output_dir": "output", **settings}
    )


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, '"gpt2" is not one of the architectures with fast kernels'),
        ("llama", {"hidden_act": "gelu"}, "the activation is gelu, not silu or gelu_pytorch_tanh"),
        ("qwen3", {"attention_dropout": 0.1}, "the model drops attention weights"),
    ],
)
def test_each_reason_for_general_kernels_is_told(
    kind: str, changes: dict[str, Any], reason: str, reported: Callable[[], list[str]]
) -> None:
    model = make_model(kind, **changes)
    assert why_not(model) == reason
    made = make_engine(config_of(), model, CPU, TOKENS)
    assert reported()[0] == f"Using general kernels (slower, more memory): {reason}."
    assert not isinstance(getattr(made.add_gradients, "__self__", None), TrainingDecoder)


@pytest.mark.parametrize("asked", [False, True])
def test_a_load_balancing_loss_that_is_not_trained_is_named(asked: bool, reported: Callable[[], list[str]]) -> None:
    make_engine(config_of(), make_mixture(output_router_logits=asked), CPU, TOKENS)
    assert (BALANCE in reported()) is asked


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_with_dropout_is_a_reason(dropout: float, reported: Callable[[], list[str]]) -> None:
    model = make_model("qwen2")
    add_lora(model, None, 2, 4.0, dropout, variant=Variant(use_dora=True))
    config = config_of(use_lora=True, use_dora=True, lora_dropout=dropout, gradient_checkpointing=False)
    made = make_engine(config, model, CPU, TOKENS)
    assert isinstance(getattr(made.add_gradients, "__self__", None), TrainingDecoder) is not bool(dropout)
    reason = "Using general kernels (slower, more memory): DoRA with lora_dropout"
    assert any(reason in line for line in reported()) is bool(dropout)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_rotary_table_that_depends_on_the_longest_sample_is_a_reason(kind: str, rope: str) -> None:
    model = make_model(kind, rope_parameters={"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]})
    reason = 'its rotary embedding ("dynamic") changes with the longest sample' if rope == "dynamic" else None
    assert why_not(model) == reason
    assert why_samples_would_mix(model.config) == reason


def test_a_head_with_a_bias_is_a_reason() -> None:
    model = make_model("llama")
    model.set_output_embeddings(torch.nn.Linear(32, 320))
    assert why_not(model) == "the head has a bias"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_decoders_are_made_in_silence(
    kind: str, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda *_, **__: 10**12)
    settings = {"use_lora": True, "lora_dropout": 0.25}
    made = make_engine(config_of(**settings), make_model(kind), CPU, TOKENS)
    decoder = getattr(made.add_gradients, "__self__", None)
    assert isinstance(decoder, TrainingDecoder)
    assert decoder.dropout == 0.25
    assert decoder.recompute == 0
    assert decoder.dtype == CPU.dtype
    assert reported() == []


def test_other_devices_than_cpu_and_cuda_take_the_general_kernels(reported: Callable[[], list[str]]) -> None:
    apple = Hardware(torch.device("mps"), torch.float32, "")
    made = make_engine(config_of(), make_model("qwen2"), apple, TOKENS)
    assert not isinstance(getattr(made.add_gradients, "__self__", None), TrainingDecoder)
    assert reported()[0] == "Using general kernels (slower, more memory): the fast ones were not tested on mps."


def test_dropout_of_adapters_is_not_full_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "free_bytes", lambda *_, **__: None)
    made = make_engine(config_of(lora_dropout=0.25), make_model("qwen2"), CPU, TOKENS)
    assert getattr(made.add_gradients, "__self__").dropout == 0.0  # noqa: B009


def recomputed(free: int | None, choice: bool | str, *, trained: bool = False) -> tuple[int, str]:
    """The number of layers computed again, and what was told, with so much memory free."""
    model = make_model("qwen2", num_hidden_layers=LAYERS).requires_grad_(trained)
    decoder = TrainingDecoder(model, torch.float32, member)
    config, most = config_of(gradient_checkpointing=choice), (TOKENS, TOKENS)
    with reporting() as told:
        count = engine._layers_to_recompute(config, model, decoder, most, 0, free)
    return count, "\n".join(told)


def free_for(recompute: int) -> int:
    """Free memory of which the share for buffers holds a pass that recomputes so many layers, and no more."""
    decoder = TrainingDecoder(
        make_model("qwen2", num_hidden_layers=LAYERS).requires_grad_(False), torch.float32, member
    )
    return int(decoder.pass_bytes(TOKENS, TOKENS, recompute) / engine.BUFFERS_OF_FREE) + 1


def test_the_bytes_of_a_pass_are_those_of_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_c, "elementwise", lambda: None)  # in C, norms take fewer
    decoder = TrainingDecoder(make_model("qwen2", num_hidden_layers=LAYERS), torch.float32, member)
    sample = Sample(np.arange(3, 107, dtype=np.int32), np.ones(104, dtype=np.bool_), "row")
    for decoder.recompute in (0, 2, LAYERS):
        decoder.workspace.clear()
        decoder.add_gradients(collate([sample]), torch.tensor(1.0))
        assert decoder.workspace.held_bytes() == pytest.approx(decoder.pass_bytes(104, 104), rel=0.01)


@pytest.mark.parametrize(
    ("recompute", "less", "count"),
    [(0, -(10**9), 0), (0, 0, 0), (0, 9, 2), (2, 0, 2), (2, 9, 3), (3, 0, 3), (3, 9, 4), (4, 0, 4), (4, 9, 4)],
)
def test_auto_recomputes_as_many_layers_as_memory_demands(recompute: int, less: int, count: int) -> None:
    found, told = recomputed(free_for(recompute) - less, "auto")
    assert found == count
    assert bool(told) is bool(count)
    if count:
        assert f"{count} of {LAYERS} layers are recomputed in the backward pass" in told
        assert f"a pass of {TOKENS} tokens" in told


def test_auto_leaves_room_for_gradients_and_optimizer_states() -> None:
    weights = 4 * sum(p.numel() for p in make_model("qwen2", num_hidden_layers=LAYERS).parameters())
    room = free_for(0) + weights  # training weights takes a few more buffers
    assert recomputed(room, "auto")[0] == 0
    assert recomputed(room, "auto", trained=True)[0] == LAYERS
    assert recomputed(room + 3 * weights, "auto", trained=True)[0] == 0


@pytest.mark.parametrize("free", [0, 10**12, None])
def test_true_is_all_layers_and_false_is_none_whatever_is_free(free: int | None) -> None:
    assert recomputed(free, True) == (LAYERS, "")
    assert recomputed(free, False) == (0, "")


def test_auto_computes_nothing_again_where_memory_cannot_be_told() -> None:
    assert recomputed(None, "auto") == (0, "")
    assert recomputed(0, "auto")[0] == LAYERS


@pytest.mark.parametrize("checkpointing", [False, "auto"])
def test_passes_are_made_as_small_as_the_memory_demands(
    checkpointing: bool | str, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("qwen2")
    config = config_of(gradient_checkpointing=checkpointing, optim="sgd")
    gradients = sum(parameter.numel() * 4 for parameter in model.parameters())
    decoder = TrainingDecoder(model, torch.float32, member)
    decoder.recompute = 0 if checkpointing is False else len(decoder.mlps)
    needed = decoder.pass_bytes(engine.TOKENS_PER_PASS_ON_CPU, TOKENS)
    monkeypatch.setattr(engine, "free_bytes", lambda *_, **__: gradients + needed // 2)
    made = make_engine(config, model, CPU, TOKENS)
    assert made.most_tokens == engine.TOKENS_PER_PASS_ON_CPU // 2
    assert f"so passes have at most {made.most_tokens:,} tokens instead of 768" in reported()[-1]
    monkeypatch.setattr(engine, "free_bytes", lambda *_, **__: gradients + needed // 10)
    with pytest.raises(
        UserError, match=r"a pass of the longest sample \(100 tokens\) about .* Set max_seq_length to 76 or"
    ):
        make_engine(config, model, CPU, TOKENS)
    monkeypatch.setattr(engine, "free_bytes", lambda *_, **__: gradients // 2)
    with pytest.raises(UserError, match=r"training needs more memory .* Use less memory: LoRA"):
        make_engine(config, model, CPU, TOKENS)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_passes_are_counted_as_they_are_computed_and_shrink_by_that(dropout: float) -> None:
    model = make_model("qwen2")
    add_lora(model, None, 2, 4.0, dropout)
    config = config_of(use_lora=True, lora_dropout=dropout, gradient_checkpointing=False)
    made = make_engine(config, model, CPU, TOKENS)
    assert (made.shares, made.loss_shares) == (not dropout, True)
    ids, trained = np.full(101, 3, dtype=np.int32), np.arange(101) == 100
    samples = [Sample(np.append(ids[:100], 4 + n).astype(np.int32), trained, f"row:{n}") for n in range(12)]

    def passes() -> list[Batch]:
        groups = split_evenly(samples, made.most_tokens, shares=made.shares)
        return [collate(group, shares=made.shares) for group in groups]

    decoder: Any = made.loss.__self__  # pyright: ignore[reportFunctionMemberAccess]
    sizes: list[int] = []
    for batch in passes():
        made.add_gradients(batch, torch.tensor(1.0))
        tokens = decoder._lay_out(batch, share_prefix=made.shares).token_ids
        assert batch.computed == len(tokens) - (-batch.computed % 8)
        sizes.append(len(batch.starts) - 1)
    assert sizes == ([6, 6] if dropout else [12])
    while max(sizes) > 1:  # each time half of what was computed, until a pass is one sample
        before, largest = len(passes()), max(passes(), key=lambda batch: batch.computed)
        assert f"in a pass of {largest.computed:,} tokens" in made.shrink(largest)
        assert made.most_tokens == largest.computed // 2
        sizes = [len(batch.starts) - 1 for batch in passes()]
        assert len(sizes) > before


def test_rows_with_short_and_long_rotary_factors_share_nothing() -> None:
    model = make_model("phi3", pad_token_id=0, original_max_position_embeddings=9, rope_parameters=dict(LONGROPE))
    for longest, shares in ((9, True), (10, False)):
        made = make_engine(config_of(gradient_checkpointing=False), model, CPU, longest)
        assert (made.shares, made.loss_shares) == (shares, shares)


def test_after_a_pass_that_did_not_fit_smaller_ones_are_planned_and_memory_is_given_back() -> None:
    made = make_engine(config_of(gradient_checkpointing=False), make_model("qwen2"), CPU, TOKENS)
    decoder: Any = made.loss.__self__  # pyright: ignore[reportFunctionMemberAccess]
    samples = [Sample(np.arange(3, 60, dtype=np.int32), np.ones(57, dtype=np.bool_), f"row:{n}") for n in range(4)]
    made.loss(collate(samples))
    assert decoder.workspace.held_bytes() > 0
    assert "passes have at most 114 tokens" in made.shrink(collate(samples))
    assert (made.most_tokens, decoder.most_tokens, decoder.workspace.held_bytes()) == (114, 114, 0)
    assert "all layers are recomputed" in made.shrink(collate(samples[:1]))
    assert decoder.recompute == len(decoder.mlps)
    with pytest.raises(
        UserError, match=r"row:0: out of memory with a single sample of 57 tokens\. Set max_seq_length to 28"
    ):
        made.shrink(collate(samples[:1]))


def test_a_pass_that_processes_make_together_is_not_made_smaller() -> None:
    made = make_engine(config_of(), make_model("qwen2"), CPU, TOKENS, units=Whole())
    samples = [Sample(np.arange(3, 60, dtype=np.int32), np.ones(57, dtype=np.bool_), f"row:{n}") for n in range(4)]
    with pytest.raises(UserError, match="row:0: out of memory in a pass of 228 tokens, which sharded processes make"):
        made.shrink(collate(samples))


def test_mixtures_are_not_sharded() -> None:
    assert why_not_sharded(make_model("qwen3_moe")) == "mixtures of experts are not sharded yet"
    assert why_not_sharded(make_model("qwen3")) is None
