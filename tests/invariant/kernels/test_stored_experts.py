"""A mixture whose frozen weights stay in 16 bits, computed in fp32, gives what it gives on fp32 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import batches, decoded
from mixtures import make_mixture
from tiny_runs import assert_equal, lively

from qingtune.adapters.lora import add_lora, member
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.models.as_stored import StoredExperts, compute_in_fp32

TOKENS = torch.arange(3, 24)[None]


def make_pair(kind: str, names: list[str] | None = None) -> tuple[Any, Any]:
    """One in bf16, and the same widened."""
    stored, wide = (lively(make_mixture(kind)).bfloat16() for _ in range(2))
    compute_in_fp32(stored)
    wide.float()
    for model in (stored, wide):
        if names is not None:
            add_lora(model, names, 3, 6, 0.0)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return stored, wide


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen3_5MoeText"])
def test_experts_stay_as_they_are_stored(kind: str) -> None:
    stored, wide = make_pair(kind)
    assert {parameter.dtype for name, parameter in stored.named_parameters() if ".experts." in name} == {torch.bfloat16}
    assert stored.state_dict().keys() == wide.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(stored(TOKENS).logits, wide(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["q_proj", "experts.gate_up_proj", "experts.down_proj"]])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen3_5MoeText"])
def test_training_is_bit_for_bit_the_same(kind: str, names: list[str]) -> None:
    stored, wide = make_pair(kind, names)
    assert any(isinstance(module, StoredExperts) for module in stored.modules())
    for batch in list(batches().values())[:3]:
        found, wanted = (
            decoded(model, batch, decoder=TrainingDecoder(model, torch.float32, member)) for model in (stored, wide)
        )
        assert found[0] == wanted[0]
        assert_equal(found[1], wanted[1])
