"""A decoder's buffers, its evaluations and its dropout leave nothing behind and mislead no later pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import NEWER, Gradients, apart, batches, decoded, filled, make_decodable, random_sample, rows_computed
from tiny_runs import assert_equal

from qingtune.adapters.lora import member
from qingtune.data.batch import Batch, collate
from qingtune.kernels.attention_block import AttentionBlock
from qingtune.kernels.decoder import TrainingDecoder

Choices = dict[str, Any]
CHOICES: dict[str, tuple[str, str, int | None, Choices]] = {
    "full": ("qwen2", "full", None, {}),
    "lora, one layer again": ("qwen3", "lora", None, {"recompute": 1}),
    "lora, dropout": ("llama biases linear", "lora", None, {"dropout": 0.3}),
    "lora, dropout, all again": ("qwen2", "lora", None, {"dropout": 0.3, "recompute": 2}),
    "room for more": ("qwen2", "lora", None, {"most_tokens": 1024}),
    "int8 units": ("qwen2", "lora", 8, {"int8_units": True, "recompute": 1}),
}


def seeded(model: Any, batch: Batch, decoder: TrainingDecoder, seed: int = 1) -> tuple[float, Gradients]:
    torch.manual_seed(seed)
    return decoded(model, batch, decoder=decoder)


@pytest.mark.parametrize("name", CHOICES)
def test_buffers_that_grow_and_shrink_change_nothing(name: str) -> None:
    kind, trained, bits, choices = CHOICES[name]
    model = make_decodable(kind, trained, bits=bits)
    used = TrainingDecoder(model, torch.float32, member, **choices)
    for batch in [*batches().values(), *reversed(batches().values())]:
        fresh = TrainingDecoder(model, torch.float32, member, **choices)
        loss, gradients = seeded(model, batch, used)
        wanted_loss, wanted = seeded(model, batch, fresh)
        assert loss == wanted_loss
        assert_equal(gradients, wanted)


@pytest.mark.parametrize("name", CHOICES)
def test_evaluation_between_steps_changes_nothing(name: str) -> None:
    kind, trained, bits, choices = CHOICES[name]
    model = make_decodable(kind, trained, bits=bits)
    decoder = TrainingDecoder(model, torch.float32, member, **choices)
    batch, *others = batches().values()
    plain = TrainingDecoder(model, torch.float32, member, **{**choices, "dropout": 0.0})
    wanted = seeded(model, batch, decoder)
    for other in [*others, batch]:
        state = torch.get_rng_state()
        loss = decoder.loss(other)
        assert torch.equal(torch.get_rng_state(), state)
        assert not loss.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert float(loss) == pytest.approx(decoded(model, other, decoder=plain)[0], rel=1e-6)  # without dropout
    found = seeded(model, batch, decoder)
    assert found[0] == wanted[0]
    assert_equal(found[1], wanted[1])


@pytest.mark.parametrize("name", CHOICES)
def test_a_pass_that_was_not_finite_is_forgotten(name: str) -> None:
    kind, trained, bits, choices = CHOICES[name]
    model = make_decodable(kind, trained, bits=bits)
    decoder = TrainingDecoder(model, torch.float32, member, **choices)
    batch = batches()["several blocks"]
    wanted = seeded(model, batch, decoder)
    _, spoiled = decoded(model, batch, float("nan"), decoder)
    assert all(gradient.isnan().any() for gradient in spoiled.values())
    norm = decoder.norm.weight
    kept = norm.detach().clone()
    norm.data.fill_(float("inf"))
    decoder.loss(batch)
    norm.data.copy_(kept)
    found = seeded(model, batch, decoder)
    assert found[0] == wanted[0]
    assert_equal(found[1], wanted[1])


@pytest.mark.parametrize(("kind", "recompute"), [("qwen2", 1), ("qwen3", 2), *((kind, 2) for kind in NEWER)])
def test_recomputing_changes_nothing_bit_for_bit(kind: str, recompute: int) -> None:
    model = make_decodable(kind)
    for batch in batches().values():
        if kind in NEWER and len(batch.token_ids) >= 300:
            continue
        decoders = [TrainingDecoder(model, torch.float32, member, dropout=0.3, recompute=n) for n in (0, recompute)]
        (loss, wanted), (found_loss, found) = (seeded(model, batch, decoder) for decoder in decoders)
        assert found_loss == loss
        assert_equal(found, wanted)


@pytest.mark.parametrize(("kind", "recompute"), [("qwen2", 0), ("qwen3", 1), ("llama biases yarn", 2)])
def test_gradients_under_dropout_are_those_of_differences_at_the_same_seed(kind: str, recompute: int) -> None:
    model = make_decodable(kind, dtype=torch.float64)
    decoder = TrainingDecoder(model, torch.float64, member, dropout=0.3, recompute=recompute)
    batch = batches()["common beginning"]
    _, gradients = seeded(model, batch, decoder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses: list[float] = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * 1e-5)
            losses.append(seeded(model, batch, decoder)[0])
            parameter.data.sub_(direction, alpha=sign * 1e-5)
        slope = float((gradients[name] * direction).sum())
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-6), name


def test_dropout_keeps_the_expectation() -> None:
    # With lora_B at zero its gradient is linear in the masks, so its mean differs from that without dropout by chance:
    # the standard score is 1 (root mean square). A factor on the kept values that is off shows as a large one.
    model, batch, count = make_decodable("qwen2", dtype=torch.float64), collate([random_sample(60, 1)]), 64
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    loss, plain = decoded(model, batch)
    decoder = TrainingDecoder(model, torch.float64, member, dropout=0.4)
    drawn = [seeded(model, batch, decoder, seed) for seed in range(count)]
    assert [one for one, _ in drawn] == pytest.approx([loss] * count)
    for name in (name for name in plain if "lora_B" in name):
        found = torch.stack([gradients[name] for _, gradients in drawn])
        scores = (found.mean(0) - plain[name]) / (found.std(0) / count**0.5)
        assert 0.5 < float(scores.square().mean().sqrt()) < 1.6, name
        assert float((plain[name] / (found.std(0) / count**0.5)).square().mean().sqrt()) > 8, name  # enough of them


def test_under_dropout_samples_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_computed(monkeypatch, AttentionBlock)
    batch = batches()["common beginning"]
    decoder = TrainingDecoder(make_decodable("qwen2"), torch.float32, member, dropout=0.1)
    decoder.add_gradients(batch, torch.tensor(1.0))
    assert rows == [filled(len(batch.token_ids))] * 2
    decoder.loss(batch)
    assert max(rows[2:]) < len(batch.token_ids)


def test_dropout_differs_from_seed_to_seed() -> None:
    model, batch = make_decodable("qwen2"), batches()["one sample"]
    decoder = TrainingDecoder(model, torch.float32, member, dropout=0.3)
    one, other = (seeded(model, batch, decoder, seed) for seed in (1, 2))
    assert one[0] != other[0]
    assert apart(one[1], other[1]) > 1e-2
    assert seeded(model, batch, decoder, 1)[0] == one[0]
