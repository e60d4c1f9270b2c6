"""A loss or gradient that is not finite makes no update; five in a row end the run with a message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qingtune.commands.train import train
from qingtune.config.load import load_train_config
from qingtune.data.batch import Batch
from qingtune.errors import UserError
from qingtune.training import setup
from qingtune.training.engine import Engine

Start = Callable[..., bool]


NAN, INF = float("nan"), float("inf")
# What is added to the loss, and what its gradient is multiplied with.
NOT_FINITE = {
    "loss": (NAN, 1.0),
    "infinite loss": (INF, 1.0),
    "gradient": (0.0, NAN),
    "infinite gradient": (0.0, INF),
    "both": (NAN, NAN),
}


@pytest.fixture
def start(tmp_path: Path, data_file: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Start:
    """A function that runs eight steps of two micro-batches, in which some steps' second micro-batch is spoiled."""
    make_engine = setup.make_engine

    def start_run(spoiled: set[int], kind: str = "loss", **settings: Any) -> bool:
        calls: list[int] = []

        def make_spoiling(*args: Any, **more: Any) -> Engine:
            engine = make_engine(*args, **more)

            def add_gradients(batch: Batch, scale: torch.Tensor) -> torch.Tensor:
                calls.append(1)
                step, second = (len(calls) + 1) // 2, len(calls) % 2 == 0
                addend, factor = NOT_FINITE[kind] if step in spoiled and second else (0.0, 1.0)
                return engine.add_gradients(batch, scale * factor) + addend

            return dataclasses.replace(engine, add_gradients=add_gradients)

        monkeypatch.setattr(setup, "make_engine", make_spoiling)
        values = {
            "model_name_or_path": str(tiny()), "data_path": str(data_file), "output_dir": str(tmp_path / "output"),
            "max_steps": 8, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "save_steps": 1,
            "learning_rate": 0.01, "logging_steps": 1, "bf16": False, "report_to": "none", **settings,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(values))
        return train(load_train_config(str(tmp_path / "config.json"), {}).config)

    return start_run


def saved(tmp_path: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer states after a step."""
    folder = tmp_path / "output" / f"checkpoint-{step}"
    return load_file(folder / "weights.safetensors") | load_file(folder / "optimizer.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", [{}, {"use_lora": True}, {"use_qlora": True}], ids=["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_no_update_and_the_run_goes_on(
    kind: str, method: dict[str, Any], start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start({3}, kind, **method)
    assert same(saved(tmp_path, 3), saved(tmp_path, 2))
    assert not same(saved(tmp_path, 4), saved(tmp_path, 3))
    assert all(bool(tensor.isfinite().all()) for tensor in saved(tmp_path, 8).values())
    told = capsys.readouterr().err
    assert "step 3: loss" in told
    assert told.count("no update") == 1


def test_five_in_a_row_end_the_run(start: Start, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"step 7: loss or gradient was not finite 5 steps in a row\. Start over with a lower learning_rate",
    ):
        start({3, 4, 5, 6, 7})
    assert same(saved(tmp_path, 6), saved(tmp_path, 2))
    assert not (tmp_path / "output" / "qingtune.json").exists()


def test_four_in_a_row_and_later_more_do_not(start: Start) -> None:
    assert start({1, 2, 3, 4, 6, 7, 8})


def test_metrics_stay_json(start: Start, tmp_path: Path) -> None:
    start({3})
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON, and strict readers stop at it")

    for line in lines:
        json.loads(line, parse_constant=refuse)
