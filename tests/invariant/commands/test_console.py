"""The console decides no run's fate: training ends with its result whatever becomes of its log or notebook."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LORA, assert_equal, metrics, train, weights

from qingtune.cli import main
from qingtune.commands import train as train_command
from qingtune.machine.signals import Terminated, put_off, unwinding
from qingtune.runs.record import CURVE, read_record
from qingtune.training import loop, result

STEPS = 4
needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def _cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "backends.mps"):
        monkeypatch.setattr(f"torch.{kind}.is_available", lambda: False)


@pytest.fixture
def flags(tiny: Callable[..., Path], data_file: Path, tmp_path: Path) -> list[str]:
    """Of a short training run into tmp_path/out."""
    values = {
        "model_name_or_path": tiny(), "data_path": data_file, "output_dir": tmp_path / "out", "bf16": False,
        "report_to": "none", "logging_steps": 1, "max_steps": STEPS, **LORA,
    }  # fmt: skip
    return ["train", *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


def lost(folder: Path) -> list[str]:
    record = read_record(folder)
    assert record is not None
    assert record.results["steps"] == STEPS
    assert (folder / CURVE).stat().st_size > 1000
    return record.results.get("lost_output", [])


@contextmanager
def failing(reason: str) -> Iterator[None]:
    """stdout and stderr that cannot be written, as `2>&1 | head` and a full disk leave them."""
    if reason == "Broken pipe":
        reading, descriptor = os.pipe()
        os.close(reading)
    elif Path("/dev/full").exists():
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("needs Linux's full device")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", encoding="utf-8") for _ in before)
    try:
        yield
    finally:
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.close()  # as Python does at its end: nothing that cannot be written is left in it
        os.close(descriptor)


@pytest.mark.parametrize("reason", ["Broken pipe", "No space left on device"])
def test_training_outlives_its_log(flags: list[str], tmp_path: Path, reason: str) -> None:
    with failing(reason):
        code = main(flags)
    assert code == 0
    assert lost(tmp_path / "out") == [f"stderr: {reason}"]


def test_training_without_streams(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(flags) == 0
    assert lost(tmp_path / "out") == ["stdout: it is closed", "stderr: it is closed"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://no.such", "nonsense"])
def test_training_in_a_notebook(
    backend: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    class Notebook:
        def write(self, text: str) -> None:
            shown.append(text)

        def flush(self) -> None:
            pass

    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.setattr(sys, "stdout", Notebook())
    monkeypatch.setattr(sys, "stderr", Notebook())
    codes: list[int] = []

    async def cell() -> None:
        codes.append(main(flags))

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    assert codes == [0]
    assert lost(tmp_path / "out") == []
    assert f"Result: {tmp_path / 'out'}" in "".join(shown)
    assert "was not drawn" not in "".join(shown)


def test_a_picture_that_cannot_be_drawn_costs_nothing(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qingtune.runs.plots.lettering", lambda *_: 1 / 0)
    assert main(flags) == 0
    assert "Warning: loss_curve.png was not drawn: ZeroDivisionError" in capsys.readouterr().err
    assert read_record(tmp_path / "out")


def test_a_model_given_by_its_path_is_named_once(
    flags: list[str], tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--dry_run"]) == 0
    assert f"Model: {tiny()}.\n" in capsys.readouterr().err


def test_the_evaluation_before_the_first_step_is_announced(
    flags: list[str], data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--eval_data_path", str(data_file), "--max_steps", "2", "--eval_strategy", "epoch"]) == 0
    told = capsys.readouterr().err
    samples = data_file.read_text(encoding="utf-8").count("\n")
    assert told.index(f"Evaluating {samples} samples before the first step ...\n") < told.index("step 0: eval_loss")
    assert told.count("Evaluating") == 1


# --- Signals ---------------------------------------------------------------------------------------------------------


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, numbers: list[int]) -> None:
    """Have signals come within a step."""
    do_step = loop._step

    def wrapped(work: Any, limits: Any, processes: Any, emit: Any, progress: Any) -> Any:
        if progress.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return do_step(work, limits, processes, emit, progress)

    monkeypatch.setattr(loop, "_step", wrapped)


@needs_posix
@pytest.mark.parametrize("names", ["SIGHUP", "SIGUSR1", "SIGHUP SIGHUP", "SIGHUP SIGTERM", "SIGTERM SIGHUP SIGUSR1"])
def test_a_signal_saves_and_the_same_command_goes_on(
    names: str, flags: list[str], data_file: Path, tiny: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        signal_at(patch, 2, [signal.Signals[name] for name in names.split()])
        assert main(flags) == 130
    assert "Stopped and saved after step 2. To resume: " in capsys.readouterr().err
    assert main(flags) == 0
    train(tmp_path / "whole", tiny(), data_file, **LORA, max_steps=STEPS, learning_rate=2e-4)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@needs_posix
@pytest.mark.parametrize("names", ["SIGTERM SIGTERM", "SIGINT SIGTERM", "SIGHUP SIGINT SIGINT"])
def test_asked_twice_it_leaves_at_once(
    names: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_at(monkeypatch, 2, [signal.Signals[name] for name in names.split()])
    assert main(flags) == 130
    said = "Interrupted before the first checkpoint: nothing was saved. Run the same command to start again.\n"
    assert capsys.readouterr().err.endswith(said)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@needs_posix
def test_ctrl_c_outside_of_the_steps_says_what_was_saved(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "load_adapted_model", interrupted)
        assert main(flags) == 130
    assert "nothing was saved. Run the same command to start again." in capsys.readouterr().err
    with monkeypatch.context() as patch:
        signal_at(patch, 2, [signal.SIGINT])
        assert main(flags) == 130
    assert list((tmp_path / "out").glob("checkpoint-2"))
    monkeypatch.setattr(train_command, "_open", interrupted)
    assert main(flags) == 130
    assert "Interrupted: the checkpoint of step 2 is kept. To resume: " in capsys.readouterr().err


@needs_posix
def test_nohup_is_heeded(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 2, [signal.SIGHUP])
        assert main(flags) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert lost(tmp_path / "out") == []


@needs_posix
def test_a_signal_while_the_result_is_written_waits(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = result.save_adapter

    def interrupted(*arguments: Any, **choices: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **choices)

    monkeypatch.setattr(result, "save_adapter", interrupted)
    assert main(flags) == 0
    assert lost(tmp_path / "out") == []


@needs_posix
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_other_commands_unwind(
    name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data_file: Path
) -> None:
    number, cleaned = signal.Signals[name], []

    def interrupted(*_: object) -> int:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # once more, while it unwinds
            cleaned.append("all of it")
        return 0

    monkeypatch.setattr("qingtune.commands.check.check", interrupted)
    assert main(["check", "--data", str(data_file)]) == code
    assert cleaned == ["all of it"]
    assert f"ended by {name}" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


@needs_posix
def test_handlers_of_others_are_left_alone() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        with unwinding():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@needs_posix
def test_a_signal_that_a_library_turned_into_an_error_is_still_a_signal() -> None:
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(Terminated) as ended, unwinding():
        library()
    assert ended.value.name == "SIGTERM"
    with pytest.raises(ValueError, match="mine"), unwinding():
        raise ValueError("mine")


@needs_posix
def test_a_message_of_a_signal_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("qingtune.machine.signals.os.write", closed)
    with unwinding(), put_off("Wait.") as received:
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGHUP]
    with pytest.raises(Terminated) as ended, unwinding():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert json.dumps(ended.value.name) == '"SIGTERM"'
