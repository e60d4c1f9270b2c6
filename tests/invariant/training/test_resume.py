"""A run that was stopped and goes on equals one that was not: weights and metrics bit for bit, in fp32 on the CPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, write_jsonl
from safetensors.torch import load_file
from tiny_runs import LORA, METHODS, QLORA4, QLORA8, assert_close, assert_equal, metrics, save_model, train, weights

from qingtune.errors import UserError
from qingtune.training import setup
from qingtune.training.engine import Engine
from qingtune.training.optim import make_schedule

STEPS = 6
# 14 rows to train on make windows of 4, 4, 4 and 2: the six steps end in the second epoch.
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "val_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}
DROPOUT = {"lora_dropout": 0.3}
Runs = Callable[..., bool]


@pytest.fixture
def start(tmp_path: Path) -> Runs:
    """A function that starts a run in a folder of this name."""
    data = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(18))
    model = save_model(tmp_path / "model")

    def start_run(name: str, **settings: Any) -> bool:
        return train(tmp_path / name, model, data, **COMMON | settings)

    return start_run


def raise_at_call(monkeypatch: pytest.MonkeyPatch, number: int, signals: list[signal.Signals]) -> None:
    """Have signals come in the middle of the work: at this call of the engine, in training or evaluation."""
    calls: list[int] = []
    make_engine = setup.make_engine

    def interrupted(compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == number:
            for one in signals:
                signal.raise_signal(one)
        return compute(*args)

    def make_interrupted(*args: Any, **more: Any) -> Engine:
        engine = make_engine(*args, **more)
        loss, add_gradients = partial(interrupted, engine.loss), partial(interrupted, engine.add_gradients)
        return dataclasses.replace(engine, loss=loss, add_gradients=add_gradients)

    monkeypatch.setattr(setup, "make_engine", make_interrupted)


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "qingtune.json").read_text(encoding="utf-8"))["results"]


def assert_same_run(one: Path, two: Path) -> None:
    assert_equal(weights(one), weights(two))
    assert metrics(one) == metrics(two)
    last = f"checkpoint-{STEPS}"
    assert_equal(load_file(one / last / "optimizer.safetensors"), load_file(two / last / "optimizer.safetensors"))


@pytest.mark.parametrize(
    ("settings", "call", "kind"),
    [
        ({}, 6, signal.SIGTERM),  # in step 3: one evaluation and two micro-batches a step came before
        (LORA | DROPOUT, 7, signal.SIGINT),  # in the evaluation after step 2
        (QLORA4 | DROPOUT, 6, signal.SIGTERM),
        (QLORA8 | DROPOUT, 2, signal.SIGTERM),  # in the first step
        (LORA | DROPOUT | {"use_dora": True}, 7, signal.SIGTERM),
        (LORA | DROPOUT | {"init_lora_weights": "pissa"}, 6, signal.SIGTERM),
        (LORA | {"init_lora_weights": "pissa_niter_16", "loraplus_lr_ratio": 4}, 9, signal.SIGTERM),
        (LORA | {"modules_to_save": "lm_head,norm", "loraplus_lr_ratio": 4}, 7, signal.SIGTERM),
        ({"save_strategy": "no", "optim": "sgd"}, 10, signal.SIGTERM),  # in the last window of the epoch
    ],
    ids=["full", "lora", "qlora4", "qlora8", "dora", "pissa", "lora+", "head", "full, nothing saved unasked"],
)
def test_interrupted_run_equals_whole(
    settings: dict[str, Any],
    call: int,
    kind: signal.Signals,
    start: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"save_strategy": "steps"} | settings
    assert start("whole", **settings | {"save_strategy": "steps"})
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as context:
        raise_at_call(context, call, [kind])
        assert not start("stopped", **settings)
    assert not (tmp_path / "stopped" / "qingtune.json").exists()
    assert len(metrics(tmp_path / "stopped")) < len(metrics(tmp_path / "whole"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert start("stopped", **settings | {"save_strategy": "steps"})
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    before = [results(tmp_path / name)["eval_loss_before"] for name in ("stopped", "whole")]
    assert before[0] == before[1] is not None


def test_any_checkpoint_leads_to_the_same_end(start: Runs, tmp_path: Path) -> None:
    settings = LORA | DROPOUT | {"save_steps": 1}
    start("whole", **settings)
    for step in range(1, STEPS):
        # As after a power cut: the newest checkpoint is older than the log, and a half-written one lies about.
        copy = tmp_path / f"from{step}"
        checkpoint = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / checkpoint, copy / checkpoint)
        for name in ("metrics.jsonl", "train_config.json"):
            shutil.copy(tmp_path / "whole" / name, copy)
        with (copy / "metrics.jsonl").open("a") as log:
            log.write('{"step": 7, "lo')
        (copy / f"checkpoint-{step + 1}").mkdir()
        assert start(copy.name, **settings)
        assert_same_run(copy, tmp_path / "whole")


def test_second_signal_ends_at_once_and_costs_only_the_steps_since_the_checkpoint(
    start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("whole", **LORA)
    with monkeypatch.context() as context:
        raise_at_call(context, 10, [signal.SIGINT, signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            start("killed", **LORA)
    assert start("killed", **LORA)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_other_split_of_the_same_window_goes_on(start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("whole", optim="sgd")
    with monkeypatch.context() as context:
        raise_at_call(context, 6, [signal.SIGTERM])
        start("stopped", optim="sgd")
    assert start("stopped", optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_close(weights(tmp_path / "stopped"), weights(tmp_path / "whole"), share=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate was 0\.01, is 0\.02"),
        ({"gradient_accumulation_steps": 4}, "samples a step was 4, is 8"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"lora_r": 2}, "lora_r was 4, is 2"),
        ({"val_size": 2}, "data was"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], message: str, start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        raise_at_call(context, 2, [signal.SIGTERM])
        start("stopped", **LORA)
    before = (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message) as refusal:
        start("stopped", **LORA | change)
    assert "--overwrite_output_dir" in str(refusal.value)
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == before
    assert start("stopped", **LORA | change | {"overwrite_output_dir": True})  # the way out that the message names


def test_finished_run_is_not_done_again(start: Runs, tmp_path: Path) -> None:
    start("run", **LORA)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert start("run", **LORA)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


# --- Longer than it was ----------------------------------------------------------------------------------------------


def test_extended_run_equals_one_that_was_that_long(start: Runs, tmp_path: Path) -> None:
    settings = LORA | DROPOUT | {"lr_scheduler_type": "constant_with_warmup"}
    start("whole", **settings)
    start("extended", **settings | {"max_steps": 4})
    assert start("extended", **settings)
    assert_same_run(tmp_path / "extended", tmp_path / "whole")
    extended, whole = (results(tmp_path / name) for name in ("extended", "whole"))
    assert extended["extended"] == [{"after_steps": 4, "as_if_never_stopped": True}]
    assert extended["eval_loss_before"] == whole["eval_loss_before"]


def test_a_rate_that_depends_on_the_length_is_told(
    start: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LORA | {"max_steps": -1, "num_train_epochs": 1}
    start("run", **settings)
    capsys.readouterr()
    assert start("run", **settings | {"num_train_epochs": 2})
    told = capsys.readouterr().err
    assert "is finished after 4 steps; continuing to 8." in told
    assert "learning rate (cosine) was planned for 4 steps" in told
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    schedule = [make_schedule("cosine", 0.01, 2, total) for total in (4, 8)]
    assert rates == pytest.approx([schedule[step >= 4](step) for step in range(8)])
    record = json.loads((tmp_path / "run" / "qingtune.json").read_text())
    assert record["results"]["extended"] == [{"after_steps": 4, "as_if_never_stopped": False}]
    assert record["settings"]["num_train_epochs"] == 2


def test_a_stopped_extension_keeps_the_result_and_goes_on(
    start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LORA | {"lr_scheduler_type": "constant"}
    start("whole", **settings)
    start("run", **settings | {"max_steps": 2})
    before = weights(tmp_path / "run")
    with monkeypatch.context() as context:
        raise_at_call(context, 2, [signal.SIGTERM])
        assert not start("run", **settings)
    assert_equal(weights(tmp_path / "run"), before)
    assert start("run", **settings)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"save_strategy": "no"}, {"max_steps": 8}, "finished after 6 steps, and without a checkpoint it cannot"),
        ({}, {"max_steps": 4}, "max_steps was 6, is 4"),
        ({}, {"max_steps": 8, "learning_rate": 0.02}, r"learning_rate was 0\.01, is 0\.02\n"),
    ],
    ids=["no checkpoint", "fewer steps", "more than the length"],
)
def test_what_cannot_be_extended_is_refused(
    first: dict[str, Any], then: dict[str, Any], message: str, start: Runs, tmp_path: Path
) -> None:
    start("run", **LORA | first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match=message) as refusal:
        start("run", **LORA | first | then)
    assert "--overwrite_output_dir" in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


# --- Best ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_best_step_is_kept_and_becomes_the_result(method: str, start: Runs, tmp_path: Path) -> None:
    # The learning rate rises until the weights run away: some step before the last evaluates best.
    start(
        "run", **METHODS[method], eval_steps=1, save_steps=1, save_total_limit=1, load_best_model_at_end=True,
        optim="sgd", warmup_steps=STEPS, learning_rate=20.0,
    )  # fmt: skip
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    best = min(range(1, STEPS + 1), key=lambda step: evaluations[step])
    assert best < STEPS
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{STEPS}"}
    saved = load_file(tmp_path / "run" / f"checkpoint-{best}" / "weights.safetensors")
    assert_equal({plain_name(name): tensor for name, tensor in saved.items()}, weights(tmp_path / "run"))


def test_asking_for_the_best_step_when_it_was_not_saved_ends_well(
    start: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"eval_steps": 1, "save_strategy": "no", "optim": "sgd", "warmup_steps": STEPS, "learning_rate": 20.0}
    with monkeypatch.context() as context:
        raise_at_call(context, 13, [signal.SIGTERM])  # in step 5, past the best one
        assert not start("run", **settings)
    assert start("run", **settings, load_best_model_at_end=True)
    assert weights(tmp_path / "run")


def plain_name(name: str) -> str:
    """A trained parameter's name as the result's file has it."""
    return f"base_model.model.{name}.weight" if "lora_" in name else name
