"""When memory runs out in a step, the step is done in smaller passes, and training is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, METHODS, assert_close, losses, metrics, save_model, train, weights

from qingtune.data.batch import Batch
from qingtune.errors import UserError
from qingtune.training import setup
from qingtune.training.engine import Engine

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
}
COMMON: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 8, "val_size": 6, "eval_strategy": "steps", "eval_steps": 2,
    "optim": "sgd",
}  # fmt: skip
Runs = Callable[..., bool]


@pytest.fixture
def start(tmp_path: Path) -> Runs:
    """A function that starts a run in a folder of this name."""
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(30))
    model = save_model(tmp_path / "model")

    def start_run(name: str, **settings: Any) -> bool:
        return train(tmp_path / name, model, data, **COMMON | settings)

    return start_run


def limit(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception) -> list[int]:
    """Let memory run out in every pass of more tokens, after its gradients were added; returns all passes' sizes."""
    make_engine, tried = setup.make_engine, list[int]()

    def make_limited(*args: Any, **more: Any) -> Engine:
        engine = make_engine(*args, **more)

        def check(batch: Batch) -> None:
            tried.append(len(batch.token_ids))
            if len(batch.token_ids) > tokens:
                raise error

        def loss(batch: Batch) -> torch.Tensor:
            check(batch)
            return engine.loss(batch)

        def add_gradients(batch: Batch, scale: torch.Tensor) -> torch.Tensor:
            total = engine.add_gradients(batch, scale)
            check(batch)
            return total

        return dataclasses.replace(engine, loss=loss, add_gradients=add_gradients)

    monkeypatch.setattr(setup, "make_engine", make_limited)
    return tried


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", ERRORS)
def test_smaller_passes_give_the_same_training(
    error: str,
    method: str,
    start: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start("whole", **METHODS[method])
    with monkeypatch.context() as context:
        tried = limit(context, 150, ERRORS[error])
        assert start("limited", **METHODS[method])
    assert max(tried) > 300
    assert max(tried[len(tried) // 2 :]) <= 150
    assert "Out of memory in a pass of " in capsys.readouterr().err
    close = 3e-4 if method == "qlora8" else 1e-5  # which values int8 rounds up depends on the last bit
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "whole"), rel=close)
    evaluated = [
        [line["eval_loss"] for line in metrics(tmp_path / name) if "eval_loss" in line] for name in ("limited", "whole")
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=close)
    assert_close(weights(tmp_path / "limited"), weights(tmp_path / "whole"), share=1e-2 if method == "qlora8" else 1e-4)


def test_a_single_sample_that_does_not_fit_is_told_by_numbers(
    start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(monkeypatch, 10, ERRORS["CPU"])
    with pytest.raises(
        UserError, match=r"out of memory with a single sample of \d+ tokens\. Set max_seq_length to \d+"
    ):
        start("run", eval_strategy="no", **LORA)
    assert "from now on, all layers are recomputed in the backward pass" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_want_of_memory(start: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 10, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        start("run", eval_strategy="no", **LORA)
