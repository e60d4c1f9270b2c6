"""A trial: a setup with a seed, trained by `qingtune train` in a separate process, and its outcome."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import qingtune
from qingtune.config.load import load_train_config
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.evaluation.compare.setups import Setup
from qingtune.files.json_files import read_object
from qingtune.files.write import open_in_place, write_json, write_text
from qingtune.machine.signals import handled, heeded, tell_at_once
from qingtune.output.console import say
from qingtune.output.invocation import command_line
from qingtune.runs.folder import who_writes_to, why_no_checkpoint
from qingtune.runs.measures import loss_of_result
from qingtune.runs.page.source import Curves, read_curves
from qingtune.runs.record import LATEST, METRICS, RECORD, WEIGHTS_REMOVED, differences, read_record, settings_to_compare

SECONDS_BETWEEN_LOOKS = 0.2
State = Literal["finished", "failed", "stopped", "pruned", "not run"]
Watch = Callable[[Curves], bool]


@dataclass(frozen=True)
class Trial:
    """A setup with a seed, and its folder; configuration and output are next to it."""

    setup: Setup
    seed: int
    folder: Path

    @property
    def config_file(self) -> Path:
        """Its whole configuration, for `qingtune train --config_file`."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log_file(self) -> Path:
        """The output of the process."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def config(self) -> TrainConfig:
        """The setup's with this seed and folder; held-out rows are the same for all seeds."""
        config = self.setup.config
        held_out = {"val_seed": config.seed if config.val_seed is None else config.val_seed}
        return config.model_copy(
            update={"seed": self.seed, "output_dir": str(self.folder), **(held_out if config.val_size else {})}
        )


@dataclass(frozen=True)
class Numbers:
    """What a finished trial measured.

    Attributes:
        peak_bytes: the most memory its process held.
        trained_parameters: of `parameters` in all.
        tokens_per_second: after the warm-up; see runs/measures.py.
        seconds: in steps and evaluations, over all starts of the trial.
        eval_loss_before: mean over the trained tokens of the evaluation data, in nats; before the first step.
        eval_loss: the same of the result.
    """

    peak_bytes: int
    trained_parameters: int
    parameters: int
    tokens_per_second: float
    seconds: float
    eval_loss_before: float
    eval_loss: float


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended; `message` says why it failed, or where it was stopped."""

    state: State
    message: str = ""
    numbers: Numbers | None = None


@dataclass
class Interruption:
    """Signals that end a command, passed on to the trial that runs: its process saves and ends, and no other begins."""

    asked: bool = False
    child: subprocess.Popen[bytes] | None = None

    def note(self, number: int, _frame: object) -> None:
        """Take a signal; the trial's process takes a second one as training does."""
        self.asked = True
        if self.child is None:
            tell_at_once("Stopping.")
        else:
            tell_at_once("The trial finishes its step and saves. Press Ctrl-C again to exit at once.")
            self.child.send_signal(number)


def wait_for_left_behind(trials: Path, stopping: Interruption) -> None:
    """Wait for trials of an earlier start that was killed: they train on, and two at once would slow each other."""
    for folder in sorted(trials.glob("*/")):
        if (holder := who_writes_to(folder)) and not stopping.asked:
            say(f"{folder} is still being trained by {holder} of an earlier start; waiting for it.")
        while who_writes_to(folder) and not stopping.asked:
            time.sleep(SECONDS_BETWEEN_LOOKS)


@contextmanager
def interruption() -> Generator[Interruption]:
    """Have signals noted instead of ending this process."""
    noted = Interruption()
    with handled([signal.SIGINT, *heeded()], noted.note):
        yield noted


def run_trial(trial: Trial, stopping: Interruption, watch: Watch) -> TrialOutcome:
    """Train in a new process, or resume; checkpoints of a finished trial are removed.

    `watch` gets what the run logged so far whenever there is more; True to stop the trial for good.
    """
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(trial.config_file, {**trial.config.model_dump(mode="json", exclude_defaults=True), "seed": trial.seed})
    code, pruned = _run_process(trial, stopping, watch)
    if code == 0:
        remove_checkpoints(trial.folder)
        return finished_outcome(trial)
    if pruned and not stopping.asked:
        remove_checkpoints(trial.folder)
        return TrialOutcome("pruned", last_evaluation(trial))
    if stopping.asked:
        return TrialOutcome("stopped", last_evaluation(trial))
    return TrialOutcome("failed", _reason(code, trial.log_file))


def is_trial_file(path: Path) -> bool:
    """Whether a file is the configuration of a trial, next to its folder."""
    try:
        return Path(str(read_object(path)["output_dir"])).name == path.stem
    except (OSError, UserError, KeyError):
        return False


def training_command(trial: Trial) -> list[str]:
    """What trains it."""
    return [sys.executable, "-m", "qingtune", "train", "--config_file", str(trial.config_file)]


def _run_process(trial: Trial, stopping: Interruption, watch: Watch) -> tuple[int, bool]:
    """The exit code, and whether `watch` had the process stopped."""
    here = str(Path(qingtune.__file__).resolve().parent.parent)  # a clone may not be installed
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    pruned, seen = False, 0
    with open_in_place(trial.log_file, append=True) as log:
        child = subprocess.Popen(
            training_command(trial),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "120"},
            start_new_session=True,  # so that Ctrl-C comes here alone, and is passed on once
        )
        stopping.child = child
        if stopping.asked:  # just before the child was known
            child.terminate()
        try:
            while child.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                size = metrics_size(trial.folder)  # read only what changed: the trial's speed is measured meanwhile
                if size != seen and not pruned:
                    pruned = watch(read_curves(trial.folder / METRICS))
                    if pruned:
                        child.terminate()
                seen = size
        finally:
            stopping.child = None
            if child.poll() is None:  # something went wrong here: leave no process behind
                child.terminate()
                child.wait()
        return child.returncode, pruned


def metrics_size(folder: Path) -> int:
    """Bytes of metrics.jsonl."""
    path = folder / METRICS
    return path.stat().st_size if path.exists() else 0


def remove_checkpoints(folder: Path) -> None:
    """Remove what only an unfinished trial needs."""
    for path in [path for path in folder.glob("checkpoint-*") if why_no_checkpoint(path) is None]:
        shutil.rmtree(path)
    (folder / LATEST).unlink(missing_ok=True)


def remove_model(trial: Trial) -> None:
    """Remove a whole model's weights, which are large; a note in their place says how to train them again."""
    weights = [*trial.folder.glob("model*.safetensors*")]
    if not weights:
        return
    command = command_line("train", "--overwrite_output_dir", config_file=trial.config_file)
    note = "A comparison keeps only the best whole model (keep_models). To train this one again:"
    write_text(trial.folder / WEIGHTS_REMOVED, f"{note}\n{command}\n")
    for path in weights:
        path.unlink()


def last_evaluation(trial: Trial) -> str:
    """The state of a trial, in words."""
    found = read_curves(trial.folder / METRICS).evaluations
    return f"step {found[-1][0]}: eval_loss {found[-1][1]:.4f}" if found else ""


def _reason(code: int, log: Path) -> str:
    """Why a process failed: the error it printed, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if code == 2 and starts:
        return " ".join(lines[starts[-1] :]).removeprefix("error: ")
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + ("; the system does so when memory runs out" if name == "SIGKILL" else "")
    return f"exit code {code}: {lines[-1] if lines else 'it printed nothing'}"


def finished_outcome(trial: Trial) -> TrialOutcome:
    """The measurements of a finished trial; `not run` if it is not finished, failed if it has no result."""
    record = read_record(trial.folder)
    if record is None:
        return TrialOutcome("not run")
    results, curves = record.results, read_curves(trial.folder / METRICS)
    before = curves.eval_loss_before
    after = loss_of_result(results, best_kept=trial.config.load_best_model_at_end)
    if before is None or after is None or not math.isfinite(before + after):
        return TrialOutcome("failed", "eval_loss is not finite")
    return TrialOutcome(
        "finished",
        numbers=Numbers(
            peak_bytes=int(max(results["peak_bytes"], *curves.values["peak_bytes"])),
            trained_parameters=results["trained_parameters"],
            parameters=results["parameters"],
            tokens_per_second=curves.tokens_per_second or math.nan,
            seconds=sum(filter(math.isfinite, [*curves.values["seconds"], *curves.eval_seconds])),
            eval_loss_before=before,
            eval_loss=after,
        ),
    )


def check_same_settings(trials: Sequence[Trial]) -> None:
    """Refuse to mix trials of an earlier start that were trained otherwise with those to come.

    Raises:
        UserError: names each such trial and what differs.
    """
    changes: list[str] = []
    for trial in trials:
        begun = any((trial.folder / name).exists() for name in (RECORD, LATEST))
        if begun and trial.config_file.exists():
            before, now = load_train_config(str(trial.config_file), {}).config, trial.config
            changed = differences(*(settings_to_compare(config, 1, "", "") for config in (before, now)))
            changes += [f"{trial.folder.name}: {line}" for line in changed]
    if changes:
        raise UserError(
            "trials of this comparison were started with different settings:\n  " + "\n  ".join(changes),
            where=str(trials[0].folder.parent),
            fix="\nPass --overwrite_output_dir to train again, or choose another output_dir.",
        )


def check_same_work(trials: Sequence[Trial]) -> None:
    """Make sure that finished trials trained from the same weights on the same data and were evaluated on the same.

    Raises:
        UserError: they were not, so their losses cannot be compared.
    """
    first: tuple[str, dict[str, Any]] | None = None
    for trial in trials:
        if record := read_record(trial.folder):
            now = {name: record.settings.get(name) for name in ("data", "weights of the base model")}
            now["evaluation data"] = record.results.get("evaluation_data")
            first = first or (trial.folder.name, now)
            if changed := differences(first[1], now):
                raise UserError(
                    f"cannot be compared with {first[0]}: {'; '.join(changed)}",
                    where=str(trial.folder),
                    fix="Pass --overwrite_output_dir to train all again, or choose another output_dir.",
                )
