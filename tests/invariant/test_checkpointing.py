"""Recomputing activations in the backward pass changes no number, with dropout neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import LORA, assert_equal, metrics, save_model, train, weights

from qingtune.kernels import attention as kernel

STEPS, LAYERS = 3, 2
OWN_DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}


@pytest.mark.parametrize(
    ("kind", "changes", "settings"),
    [
        ("qwen2", {}, LORA | {"lora_dropout": 0.3}),
        ("llama", {}, {}),
        ("gpt2", OWN_DROPOUT, {}),
        ("gpt2", OWN_DROPOUT, LORA | {"lora_dropout": 0.3}),
    ],
)
def test_checkpointing_on_equals_off(
    kind: str,
    changes: dict[str, float],
    settings: dict[str, Any],
    tmp_path: Path,
    data_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    attention = kernel.attention

    def counted(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(kernel, "attention", counted)
    model = save_model(tmp_path / "model", kind, **changes)
    attended: list[int] = []
    for name, on in (("off", False), ("on", True)):
        calls.clear()
        train(
            tmp_path / name, model, data_file, max_steps=STEPS, per_device_train_batch_size=4,
            gradient_checkpointing=on, **settings,
        )  # fmt: skip
        attended.append(len(calls))
    assert attended == [STEPS * LAYERS, 2 * STEPS * LAYERS]  # it did recompute
    assert metrics(tmp_path / "on") == metrics(tmp_path / "off")
    assert_equal(weights(tmp_path / "on"), weights(tmp_path / "off"))
