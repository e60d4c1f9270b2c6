"""Processes that each hold a part of every layer give what one process gives that holds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, write_jsonl
from fork_server import ForkServer
from ranks import train_by
from tiny_runs import LORA, METHODS, assert_close, assert_equal, losses, metrics, save_model, train, weights

# Windows of 7 from 16 rows, in micro-batches of 2 or fewer: shares are uneven, and the last window has 2 rows only.
SETTINGS: dict[str, Any] = {
    "samples_per_step": 7,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "per_device_eval_batch_size": 3,
    "shard": "layers",
}
FULL = SETTINGS | {"learning_rate": 0.01}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, data to train on, and data to evaluate on."""
    rows = instruction_rows(21)
    data, evaluation = (
        write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in (("rows", rows[:16]), ("eval", rows[16:]))
    )
    return save_model(tmp_path / "model"), data, evaluation


@pytest.mark.parametrize(("count", "method", "bound"), [(2, "full", 1e-5), (3, "full", 1e-5), (3, "lora", 1e-5)])
def test_sharded_processes_equal_one(
    tmp_path: Path, fork_server: ForkServer, made: tuple[Path, Path, Path], count: int, method: str, bound: float
) -> None:
    model, data, evaluation = made
    settings = (FULL if method == "full" else SETTINGS | LORA) | {"eval_data_path": str(evaluation)}
    train(tmp_path / "one", model, data, **settings)
    reported = train_by(count, fork_server, tmp_path / "several", model, data, **settings)
    assert reported.count("Each holds a part of each layer") == 1
    one, several = metrics(tmp_path / "one"), metrics(tmp_path / "several")
    assert len(losses(tmp_path / "one")) == 3
    for mine, other in zip(one, several, strict=True):
        assert other == pytest.approx(mine, rel=bound)
    assert_close(weights(tmp_path / "several"), weights(tmp_path / "one"), share=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora4", "qlora8"])
def test_what_frozen_weights_are_sharded_changes_no_digit(
    tmp_path: Path, fork_server: ForkServer, made: tuple[Path, Path, Path], method: str
) -> None:
    model, data, _ = made
    settings = SETTINGS | METHODS[method] | {"lora_dropout": 0.1, "gradient_checkpointing": True}
    train_by(2, fork_server, tmp_path / "whole", model, data, **settings | {"shard": "none"})
    train_by(2, fork_server, tmp_path / "sharded", model, data, **settings)
    assert metrics(tmp_path / "sharded") == metrics(tmp_path / "whole")
    assert_equal(weights(tmp_path / "sharded"), weights(tmp_path / "whole"))


def test_a_sharded_run_resumes_with_any_number_of_processes(
    tmp_path: Path, fork_server: ForkServer, made: tuple[Path, Path, Path]
) -> None:
    model, data, _ = made
    settings = FULL | {"max_steps": 4, "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    train_by(2, fork_server, tmp_path / "run", model, data, **settings)
    settings["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-2")
    for count in (2, 3):
        reported = train_by(count, fork_server, tmp_path / f"by {count}", model, data, **settings)
        assert reported.count("Resuming from ") == 1
    train(tmp_path / "by one", model, data, **settings)
    assert_equal(weights(tmp_path / "by 2"), weights(tmp_path / "run"))
    for other in ("by 3", "by one"):
        assert_close(weights(tmp_path / other), weights(tmp_path / "run"), share=1e-4)


def test_8_bit_states_resume_with_the_same_number_of_processes(
    tmp_path: Path, fork_server: ForkServer, made: tuple[Path, Path, Path]
) -> None:
    model, data, evaluation = made
    settings = FULL | {"max_steps": 4, "save_steps": 1, "optim": "adamw_8bit", "learning_rate": 1e-3}
    settings |= {"eval_data_path": str(evaluation), "eval_strategy": "steps", "load_best_model_at_end": True}
    train_by(3, fork_server, tmp_path / "run", model, data, **settings)
    settings["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-2")
    train_by(3, fork_server, tmp_path / "same", model, data, **settings)
    assert_equal(weights(tmp_path / "same"), weights(tmp_path / "run"))
    with pytest.raises(
        AssertionError, match="8-bit states are in blocks of the rows that each process had, and 3 of them"
    ):
        train_by(2, fork_server, tmp_path / "other", model, data, **settings)
