"""Full training with 8-bit states on the CPU: it learns, goes on bit for bit, and holds weights in bf16 if it can."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, write_jsonl
from test_resume import raise_at_call
from tiny_runs import assert_equal, logits_of, losses, metrics, save_model, train, weights

from qingtune.kernels import device
from qingtune.models.load import load_model
from qingtune.training import setup
from qingtune.training.adamw8bit import AdamW8bit

Start = Callable[..., bool]
SETTINGS: dict[str, Any] = {"optim": "adamw_8bit", "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2}


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A function that starts a run in a folder of this name."""
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(12))
    model = save_model(tmp_path / "model")

    def start_run(name: str, **settings: Any) -> bool:
        return train(tmp_path / name, model, data, **SETTINGS | settings)

    return start_run


@pytest.fixture(params=["fp32", "bf16"])
def held_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What the weights are held in; here every CPU has bf16, native or emulated."""
    narrow = request.param == "bf16"
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: narrow)
    return torch.bfloat16 if narrow else torch.float32


def settings_of(dtype: torch.dtype) -> dict[str, Any]:
    return {"bf16": dtype == torch.bfloat16}


def test_the_loss_falls_and_the_result_loads(
    held_in: torch.dtype, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    make_optimizer = setup.make_optimizer

    def watched(*args: Any) -> Any:
        made = make_optimizer(*args)
        parameters = [parameter for group in made[0].param_groups for parameter in group["params"]]
        seen.append((type(made[0]), made[1], {parameter.dtype for parameter in parameters}))  # at the end in fp32
        return made

    monkeypatch.setattr(setup, "make_optimizer", watched)
    assert start("run", max_steps=15, learning_rate=5e-3, **settings_of(held_in))
    assert seen == [(AdamW8bit, None, {held_in})]
    fallen = losses(tmp_path / "run")
    assert fallen[-1] < 0.7 * fallen[0]
    assert bool(logits_of(load_model(tmp_path / "run", torch.float32)).isfinite().all())


def test_it_learns_as_adamw_does(start: Start, tmp_path: Path) -> None:
    for optim in ("adamw_8bit", "adamw_torch"):
        start(optim, optim=optim, max_steps=15, learning_rate=5e-3)
    ours, theirs = (losses(tmp_path / optim)[-1] for optim in ("adamw_8bit", "adamw_torch"))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_interrupted_run_equals_whole(
    held_in: torch.dtype, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(held_in)
    assert start("whole", **settings)
    with monkeypatch.context() as context:
        raise_at_call(context, 3, [signal.SIGTERM])
        assert not start("stopped", **settings)
    assert start("stopped", **settings)
    assert_equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.skipif(not device.cpu_has_bf16(), reason="this CPU has no bf16 of its own")
def test_without_a_word_a_cpu_with_bf16_holds_weights_in_it(start: Start, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert start("run", bf16=None)
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
