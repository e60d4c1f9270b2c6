"""Recomputing activations in the backward pass changes no number, with dropout neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LORA, QLORA4, QLORA8, assert_equal, metrics, save_model, train, weights
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from qingtune.kernels.attention_block import AttentionBlock
from qingtune.kernels.mlp_block import MLPBlock
from qingtune.training import engine

STEPS, LAYERS = 3, 2
OWN_DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
DROPOUT = {"lora_dropout": 0.3}


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """A list that grows by one with each call of a function."""
    calls: list[int] = []
    plain = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", LORA | DROPOUT),
        ("qwen3", LORA),
        ("llama", {}),
        ("qwen2", QLORA4 | DROPOUT),
        ("llama", QLORA8),
    ],
    ids=["qwen2 lora dropout", "qwen3 lora", "llama full", "qwen2 qlora4 dropout", "llama qlora8"],
)
def test_decoder_gives_the_same_whatever_it_recomputes(
    kind: str, settings: dict[str, Any], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = count_calls(monkeypatch, MLPBlock, "forward_again")
    attended = count_calls(monkeypatch, AttentionBlock, "forward")
    model = save_model(tmp_path / "model", kind)

    def counts_of(name: str, on: bool) -> tuple[int, int]:
        again.clear()
        attended.clear()
        train(
            tmp_path / name, model, data_file, max_steps=STEPS, per_device_train_batch_size=4,
            gradient_checkpointing=on, **settings,
        )  # fmt: skip
        return len(again), len(attended)

    assert counts_of("none", False) == (0, STEPS * LAYERS)
    assert counts_of("all", True) == (STEPS * LAYERS, 2 * STEPS * LAYERS)  # it did recompute
    monkeypatch.setattr(engine, "_layers_to_recompute", lambda *_, **__: 1)
    assert counts_of("one", True) == (STEPS, STEPS * (LAYERS + 1))
    for name in ("all", "one"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "none")
        assert_equal(weights(tmp_path / name), weights(tmp_path / "none"))


@pytest.mark.parametrize("settings", [{}, LORA | DROPOUT], ids=["full", "lora dropout"])
def test_checkpointing_of_general_models_on_equals_off(
    settings: dict[str, Any], tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, GPT2MLP, "forward")
    model = save_model(tmp_path / "model", "gpt2", **OWN_DROPOUT)
    counts: list[int] = []
    for name, on in (("off", False), ("on", True)):
        calls.clear()
        train(
            tmp_path / name, model, data_file, max_steps=STEPS, per_device_train_batch_size=4,
            gradient_checkpointing=on, **settings,
        )  # fmt: skip
        counts.append(len(calls))
    assert counts[1] - counts[0] == STEPS * LAYERS  # it did recompute
    assert metrics(tmp_path / "on") == metrics(tmp_path / "off")
    assert_equal(weights(tmp_path / "on"), weights(tmp_path / "off"))
