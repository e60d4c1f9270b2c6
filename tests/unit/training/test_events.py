"""Events are grouped without losing a token, and their sinks write what was measured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from qingtune.training.events import (
    ConsoleSink,
    Evaluated,
    Event,
    EverySteps,
    LinesFile,
    MetricsFile,
    Noted,
    Stepped,
    as_metrics,
    to_all,
)


def stepped(step: int, loss: float = 1.0, trained: int = 10, rate: float = 1e-4) -> Stepped:
    return Stepped(step, step / 8, loss, rate, 0.5 * step, 2 * trained, trained, 0.25, 1000 + step)


def grouped(count: int, last: int, events: list[Event]) -> list[Event]:
    passed: list[Event] = []
    sink = EverySteps(count, last, passed.append, [])
    for event in events:
        sink(event)
    return passed


# --- Groups of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "first", "last", "logged"),
    [
        (1, 1, 3, [1, 2, 3]),
        (4, 1, 10, [4, 8, 10]),
        (4, 1, 8, [4, 8]),
        (4, 7, 14, [8, 12, 14]),  # a run that goes on at step 7 logs at the steps of an uninterrupted one
        (50, 1, 3, [3]),
    ],
)
def test_steps_are_logged_at_multiples_and_at_the_end(count: int, first: int, last: int, logged: list[int]) -> None:
    passed = grouped(count, last, [stepped(step) for step in range(first, last + 1)])
    assert [event.step for event in passed if isinstance(event, Stepped)] == logged
    assert sum(event.trained_tokens for event in passed if isinstance(event, Stepped)) == 10 * (last - first + 1)


def test_a_group_is_the_mean_over_its_trained_tokens_and_the_sum_of_its_work() -> None:
    steps: list[Event] = [stepped(1, 4.0, 1), stepped(2, 1.0, 99, 2e-4), stepped(3, 2.0, 20, 3e-4)]
    (group,) = grouped(3, 9, steps)
    assert group == dataclasses.replace(
        stepped(3, 2.0, 20, 3e-4), loss=pytest.approx((4 + 99 + 40) / 120), tokens=240, trained_tokens=120, seconds=0.75
    )


def test_a_loss_that_is_not_finite_shows_in_its_group_alone() -> None:
    passed = grouped(2, 4, [stepped(1), stepped(2, math.nan), stepped(3), stepped(4)])
    assert [math.isnan(event.loss) for event in passed if isinstance(event, Stepped)] == [True, False]


def test_other_events_go_on_at_once() -> None:
    evaluated, noted = Evaluated(1, 0.1, 2.0, 50, 0.3), Noted("look")
    passed = grouped(2, 4, [stepped(1), evaluated, noted, stepped(2)])
    assert passed[:2] == [evaluated, noted]
    assert isinstance(passed[2], Stepped)


def test_to_all_keeps_the_order() -> None:
    heard: list[tuple[str, Event]] = []
    emit = to_all([lambda event: heard.append(("a", event)), lambda event: heard.append(("b", event))])
    emit(Noted("x"))
    assert heard == [("a", Noted("x")), ("b", Noted("x"))]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_written_through_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, 0)
    events: list[Event] = [Evaluated(0, 0.0, 3.0, 50, 0.3), stepped(1), Noted("not a measurement"), stepped(2)]
    for number, event in enumerate(events):
        sink(event)
        assert len(read(path)) == (1, 2, 2, 3)[number]  # no buffer between a measurement and the disk
    assert read(path)[1] == dataclasses.asdict(stepped(1))
    assert read(path)[0] == {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_tokens": 50, "eval_seconds": 0.3}


@pytest.mark.parametrize("rest", ["", '{"step": 5, "los', '{"step": 5'])
def test_a_run_that_goes_on_keeps_the_lines_up_to_its_step(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for event in (Evaluated(0, 0.0, 3.0, 50, 0.3), stepped(2), Evaluated(2, 0.2, 2.0, 50, 0.3), stepped(4)):
        first(event)
    first.file.write(rest.encode())
    first.file.close()
    MetricsFile(path, 2)(stepped(3))
    assert [line["step"] for line in read(path)] == [0, 2, 2, 3]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0)(stepped(1))
    MetricsFile(path, 0)
    assert path.read_text(encoding="utf-8") == ""
    assert MetricsFile(tmp_path / "none.jsonl", 7).file.tell() == 0


def test_a_line_cut_off_within_a_character_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = '{"step": 1, "answer": "面包\u2028"}\n'.encode()
    for cut in ('{"step": 2, "answer": "面'.encode()[:-1], b'{"step": 2, "not_finite": {}'):
        path.write_bytes(whole + cut)
        LinesFile(path, 2).close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("value", [3e-4, 1.25e-6, 3.4e-10])
def test_small_numbers_are_written_as_they_are(value: float) -> None:
    metrics = as_metrics(stepped(1, rate=value))
    assert metrics is not None
    assert metrics["learning_rate"] == pytest.approx(value, rel=1e-3)


def test_metrics_are_json_to_every_reader_even_if_the_loss_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0)(stepped(1, math.nan))
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# --- The console -----------------------------------------------------------------------------------------------------


def test_off_a_terminal_plain_lines_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with ConsoleSink(10, 0) as console:
        for step in range(1, 5):
            console(stepped(step))
        console.log(stepped(4, 1.5))
        console(Evaluated(4, 0.5, 1.25, 50, 0.3))
        console(Noted("[bold]as it stands[/bold] " + "long " * 60))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = err.splitlines()
    assert lines[0].startswith("step 4/10  loss 1.5000  lr 1.00e-04  80 tok/s  0.00 GB")
    assert lines[1:] == ["step 4: eval_loss 1.2500", "[bold]as it stands[/bold] " + "long " * 60]


def test_the_time_left_is_the_median_of_the_logged_steps(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSink(100, 10)
    for step, seconds in ((20, 10.0), (30, 20.0), (40, 900.0)):
        console.log(dataclasses.replace(stepped(step), seconds=seconds))
    assert capsys.readouterr().err.splitlines()[-1].endswith("  120 s left")


def test_on_a_terminal_a_bar_stands_in_for_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ConsoleSink(10, 3) as console:
        assert console.bar is not None
        assert console.bar.tasks[0].completed == 3
        console(stepped(4, 1.5))
        console.log(stepped(4, 1.5))
        assert console.bar.tasks[0].completed == 4
        assert "loss 1.5000" in console.bar.tasks[0].description
    assert "step 4/10" not in capsys.readouterr().err


def test_lines_of_text_are_kept_whole_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    texts = ["one\u2028two", "three\x85four\n", "热的 🥖"]
    file = LinesFile(path, 0)
    for step, text in enumerate(texts, 1):
        file.add({"step": step, "answer": text})
    file.close()
    LinesFile(path, 2).close()
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert kept == [{"step": step, "answer": texts[step - 1]} for step in (1, 2)]
