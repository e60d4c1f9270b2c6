"""Trials: how processes end, what is passed on to them, and what is read from a finished one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.evaluation.compare import trial as trials
from qingtune.evaluation.compare.setups import Setup
from qingtune.evaluation.compare.trial import Interruption, Trial, TrialOutcome, interruption, run_trial
from qingtune.files.digests import write_manifest
from qingtune.runs.page.source import Curves
from qingtune.runs.record import Record, write_record

# A stand-in for training: it waits for a signal and ends as training does then.
WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("here", flush=True)
time.sleep(60)
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """A trial whose process runs a script in place of training; `config` are its settings."""

    def make_trial(script: str = "", name: str = "lora", **config: Any) -> Trial:
        monkeypatch.setattr(trials, "training_command", lambda _: [sys.executable, "-c", script])
        settings = {"use_lora": True, "lora_alpha": 16, "learning_rate": 1e-4, "data_path": ["t.jsonl"], **config}
        setup = Setup(name, "lora", {}, TrainConfig(**settings))
        return Trial(setup, 43, tmp_path / "trials" / f"{name}-seed43")

    return make_trial


def run(trial: Trial, watch: Callable[[Curves], bool] = lambda _: False) -> TrialOutcome:
    with interruption() as stopping:
        return run_trial(trial, stopping, watch)


def write_metrics(trial: Trial, *lines: dict[str, Any]) -> None:
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')


def finish(trial: Trial, data: str = "abc", evaluation: str = "def", **results: Any) -> None:
    """Leave what a finished run leaves."""
    write_metrics(
        trial,
        {"step": 0, "eval_loss": 4.0, "eval_seconds": 1.0},
        {"step": 2, "loss": 3.9, "tokens": 100, "seconds": 10.0, "peak_bytes": 7},
        {"step": 4, "loss": 3.8, "tokens": 100, "seconds": 1.0, "peak_bytes": 9},
        {"step": 6, "loss": 3.7, "tokens": 300, "seconds": 1.0, "peak_bytes": 8},
        {"step": 6, "eval_loss": 3.5, "eval_seconds": 1.5},
    )
    found = {"peak_bytes": 8, "trained_parameters": 5, "parameters": 100, "eval_loss": 3.5, "best_eval_loss": 3.4}
    found |= {"seconds": 2.0, "evaluation_data": evaluation, **results}
    settings = {"data": data, "weights of the base model": "w"}
    write_record(trial.folder, Record("lora", "m", "w", None, "chat", [], settings, found))


# --- How processes end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; print('error: a.jsonl: no.\\nMend it.', file=sys.stderr); sys.exit(2)", "a.jsonl: no. Mend it."),
        ("raise ZeroDivisionError('none left')", "exit code 1: ZeroDivisionError: none left"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL; the system does so when memory runs out"),
        ("import sys; sys.exit(130)", "exit code 130: it printed nothing"),
    ],
)
def test_failed_trial_says_why(make: Callable[..., Trial], script: str, message: str) -> None:
    assert run(make(script)) == TrialOutcome("failed", message)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(make: Callable[..., Trial], number: int) -> None:
    trial = make(WAITS)

    def look(_: Curves) -> bool:
        if "here" in trial.log_file.read_text():
            os.kill(os.getpid(), number)
        return False

    write_metrics(trial, {"step": 2, "eval_loss": 3.25})
    with interruption() as stopping:
        monitored = _each_time(stopping, trial, look)
        assert monitored == TrialOutcome("stopped", "step 2: eval_loss 3.2500")
        assert stopping.asked
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _each_time(stopping: Interruption, trial: Trial, look: Callable[[Curves], bool]) -> TrialOutcome:
    """Run with `look` called at every look, as new lines would have it called."""
    sizes = iter(range(1, 10_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "metrics_size", lambda _: next(sizes))
        return run_trial(trial, stopping, look)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with interruption() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stopping.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_trial_that_falls_behind_is_stopped_and_its_checkpoints_removed(make: Callable[..., Trial]) -> None:
    trial = make(WAITS)
    write_metrics(trial, {"step": 0, "eval_loss": 4.0}, {"step": 2, "eval_loss": 3.25}, {"step": 4, "eval_loss": 3.0})
    for name in ("checkpoint-4", "checkpoint-mine"):
        (trial.folder / name).mkdir()
    (trial.folder / "checkpoint-4" / "state.json").write_text("{}")
    write_manifest(trial.folder / "checkpoint-4")
    with interruption() as stopping:
        outcome = _each_time(stopping, trial, lambda _: "here" in trial.log_file.read_text())
    assert outcome == TrialOutcome("pruned", "step 4: eval_loss 3.0000")
    assert [path.name for path in trial.folder.glob("checkpoint-*")] == ["checkpoint-mine"]


# --- What a trial is -------------------------------------------------------------------------------------------------


def test_its_configuration_has_seed_and_folder_of_its_own(make: Callable[..., Trial]) -> None:
    trial = make("", val_size=0.1, lora_r=8, seed=42)
    run(trial)
    written = json.loads(trial.config_file.read_text())
    assert (written["seed"], written["val_seed"], written["output_dir"]) == (43, 42, str(trial.folder))
    assert (written["lora_r"], written["learning_rate"]) == (8, 1e-4)
    assert "val_seed" not in make("", eval_data_path=["e.jsonl"]).config.model_dump(exclude_defaults=True)


def test_numbers_of_a_finished_trial(make: Callable[..., Trial]) -> None:
    trial = make("")
    assert trials.finished_outcome(trial) == TrialOutcome("not run")
    finish(trial)
    numbers = trials.finished_outcome(trial).numbers
    assert numbers is not None
    assert numbers.tokens_per_second == 200  # without the first line, in which the machine warms up
    assert numbers.seconds == 14.5  # of all starts, where the record has the last one's
    assert (numbers.peak_bytes, numbers.eval_loss_before, numbers.eval_loss) == (9, 4.0, 3.5)
    best = make("", name="best", load_best_model_at_end=True)
    finish(best)
    numbers = trials.finished_outcome(best).numbers
    assert numbers is not None
    assert numbers.eval_loss == 3.4


def test_loss_that_is_no_number_is_a_failure(make: Callable[..., Trial]) -> None:
    trial = make("")
    finish(trial, eval_loss=float("nan"))
    assert trials.finished_outcome(trial) == TrialOutcome("failed", "eval_loss is not finite")
    best = make("", name="best", load_best_model_at_end=True)
    finish(best, eval_loss=float("nan"), best_eval_loss=None)
    assert trials.finished_outcome(best) == TrialOutcome("failed", "eval_loss is not finite")


def test_finished_trials_must_have_done_the_same_work(make: Callable[..., Trial]) -> None:
    one, two, three = make("", name="one"), make("", name="two"), make("", name="three")
    for trial in (one, two):
        finish(trial)
    trials.check_same_work([one, two, three])
    for changed in ({"data": "other"}, {"evaluation": "other"}):
        finish(three, **changed)
        with pytest.raises(UserError, match="cannot be compared with one-seed43"):
            trials.check_same_work([one, two, three])


def test_trials_with_other_settings_are_named(make: Callable[..., Trial]) -> None:
    begun = make("", lora_r=8)
    run(begun)
    trials.check_same_settings([make("", lora_r=16)])  # it failed before it did anything
    finish(begun)
    trials.check_same_settings([make("", lora_r=8, logging_steps=3)])
    with pytest.raises(UserError, match="lora-seed43: lora_r was 8, is 16"):
        trials.check_same_settings([make("", lora_r=16)])
