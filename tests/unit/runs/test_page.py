"""A run's page: whole and safe whatever the folder holds, in both languages, and never the end of a run."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from fake_run import HOSTILE, POST, STEPS, logged, write_run
from page_text import Page

from qingtune.commands.report import report
from qingtune.config.commands import ReportConfig
from qingtune.config.roles import ROLES
from qingtune.errors import UserError
from qingtune.runs.page import write as report_module
from qingtune.runs.page.source import EVALUATION, MOST_SAMPLES
from qingtune.runs.page.words import significant, size, time_taken
from qingtune.runs.page.write import PageOfRun, write_page
from qingtune.runs.record import FACTS, METRICS, PAGE, RECORD, SAMPLES, SETTINGS

FILES = (RECORD, SETTINGS, METRICS, FACTS, SAMPLES, EVALUATION)
NO_SIDES: dict[str, Any] = {"before": None, "difference": None, "difference_excludes_zero": None}
WITH_TEXT = {**NO_SIDES, "after": {"value": "much"}}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "我的面包店")


def page_of(folder: Path) -> Page:
    return Page(write_page(folder).read_text(encoding="utf-8"))


def assert_sound(page: Page) -> None:
    """Whole, closed to the outside, with no number that is none."""
    assert page.faults == []
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    targets = [link.removeprefix("#") for link in page.attributes("href")] + page.attributes("for")
    assert targets
    assert set(targets) <= set(ids)
    assert page.attributes("src") == []
    assert page.attributes("content").count(POLICY) == 1
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"img", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    drawn = " ".join(
        value
        for name in ("d", "style", "viewbox", "x", "y", "width", "height", "data-points")
        for value in page.attributes(name)
    )
    assert not re.search(r"nan|inf|none|undefined", drawn, re.IGNORECASE)
    assert len(page.words["en"]) == len(page.words["zh"]) > 20
    for english, chinese in zip(page.words["en"], page.words["zh"], strict=True):
        assert english.strip()
        assert chinese.strip()


def test_the_page_of_a_whole_run_is_sound_and_shows_everything(folder: Path) -> None:
    page = page_of(folder)
    assert_sound(page)
    for words in (
        "我的面包店", "LoRA", "Qwen/Qwen2.5-0.5B-Instruct", "35.19 M (6.65%)", "2.450\u00a0→ 1.579",
        "70 分钟", "2.62 GB",
        "评估损失从 2.4500 降到 1.5792，下降 35.5%（30 条留出样本）。",
        "Evaluation loss fell by 35.5%, from 2.4500 to 1.5792, on 30 held-out samples.", POST,
        "这是一家面包店，欢迎光临。", "+8.750 [+6.200,\u00a0+11.400]", "2.67 GB (+1.8%)",
        "optimizer states", "优化器状态",
        'samples.jsonl:118: "output" is empty', "layers.11.mlp.up_proj", "AMD EPYC 9R14", "5.23.0",
    ):  # fmt: skip
        assert words in page.text, words
    assert "七点出炉。" not in page.text  # neither the first nor the last step
    for id_ in ("curves", "answers", "evaluation", "memory", "data", "settings", "environment"):
        assert id_ in page.attributes("id")
    assert len([1 for tag, attributes in page.tags if "chart" in attributes.get("class", "").split()]) == 5


@pytest.mark.parametrize(("rows", "few"), [(4, True), (29, True), (30, False)])
def test_a_loss_says_on_how_many_rows_it_rests(folder: Path, rows: int, few: bool) -> None:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    facts["data"]["evaluation"]["summary"]["samples"] = rows
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    page = page_of(folder)
    assert f"on {rows} held-out samples." in page.text
    assert ("With so few, a small difference may be chance." in page.text) is few
    assert ("样本太少" in page.text) is few


def test_nothing_of_models_and_data_becomes_part_of_the_page(folder: Path) -> None:
    metrics = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    metrics["metrics"][HOSTILE] = metrics["metrics"]["loss"]
    (folder / EVALUATION).write_text(json.dumps(metrics), encoding="utf-8")
    for name in (SETTINGS, FACTS, RECORD):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(
            json.dumps(values).replace("store_xhs_sft_samples", json.dumps(HOSTILE)[1:-1]), encoding="utf-8"
        )
    page = page_of(folder)
    assert_sound(page)
    assert page.text.count(HOSTILE) >= 5
    assert "49" not in {word.strip() for word in page.shown}


@pytest.mark.parametrize("missing", FILES)
def test_what_is_missing_is_left_out_or_told(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    page = page_of(folder)
    assert_sound(page)
    told = {
        RECORD: "训练尚未完成",
        METRICS: "No step is logged yet.",
        SETTINGS: "train_config.json is missing.",
        FACTS: "This run kept no report on its data.",
        SAMPLES: "train with --eval_samples 8, or run:",
        EVALUATION: "To fill this table, run:",
    }
    for name, words in told.items():
        assert (words in page.text) == (name == missing), words


def test_the_command_that_fills_a_gap_stands_there(folder: Path) -> None:
    (folder / EVALUATION).unlink()
    page = page_of(folder)
    where = f"--output_dir '{folder}'"
    evaluate = f"qingtune evaluate --base_model Qwen/Qwen2.5-0.5B-Instruct --lora_model '{folder}' "
    assert f"{evaluate}--data data/store_xhs_heldout.jsonl {where}\nqingtune report {where}" in page.text


@pytest.mark.parametrize("only", [RECORD, SETTINGS, METRICS])
def test_one_file_is_enough(folder: Path, only: str) -> None:
    for name in set(FILES) - {only}:
        (folder / name).unlink()
    assert_sound(page_of(folder))


def test_a_run_that_goes_on_shows_where_it_stands(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False, extras=False)
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()[:51]
    (folder / METRICS).write_text("\n".join([*lines, '{"step": 51, "lo']), encoding="utf-8")
    page = page_of(folder)
    assert_sound(page)
    assert f"49 / {STEPS}" in page.text  # 51 lines, two of them evaluations
    assert "This run is not finished" in page.text


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", extras=False)
    write_jsonl(folder / METRICS, [logged(step) for step in range(1, 100_001)])
    page = write_page(folder)
    assert_sound(Page(page.read_text(encoding="utf-8")))
    assert page.stat().st_size < 1_000_000


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", extras=False)
    nothing = dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens", "seconds", "peak_bytes"))
    write_jsonl(folder / METRICS, [{"step": 0, "eval_loss": None}, *({"step": step, **nothing} for step in (1, 2))])
    page = page_of(folder)
    assert_sound(page)
    assert "No step is logged yet." in page.text


def test_an_evaluation_loss_that_rose_is_said_so(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["results"] |= {"eval_loss": 2.6, "eval_loss_before": 2.5}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    assert "Evaluation loss did not fall: 2.5000 before, 2.6000 after, on 30 held-out samples." in page_of(folder).text


def test_the_result_of_a_run_that_keeps_its_best_evaluation_is_that_one(folder: Path) -> None:
    for name, change in ((RECORD, {"best_eval_loss": 1.5}), (SETTINGS, {"load_best_model_at_end": True})):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (values["results"] if name == RECORD else values).update(change)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    assert "from 2.4500 to 1.5000" in page_of(folder).text


def test_secrets_do_not_show(folder: Path) -> None:
    token = "hf_" + "abcdefghijklmnop"
    for name in (SETTINGS, FACTS, RECORD, SAMPLES):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("蓝门", token).replace("Qwen", token), encoding="utf-8")
        assert token in (folder / name).read_text(encoding="utf-8") or name == FACTS
    assert token not in write_page(folder).read_text(encoding="utf-8")


def test_many_and_long_answers_are_cut_and_counted(folder: Path) -> None:
    rows = [{"step": 0, "prompt": f"p{n}", "reference": None, "answer": "y" * 5000} for n in range(MOST_SAMPLES + 3)]
    write_jsonl(folder / SAMPLES, rows)
    page = page_of(folder)
    assert_sound(page)
    assert "3 more are in the folder." in page.text
    assert page.text.count("y" * 4000 + " … (+1,000)") == MOST_SAMPLES
    assert "y" * 4001 not in page.text


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"instruction": "Write.", "input": "Shop", "output": "ref"}, "Write.\n\nShop", "ref"),
        ({"prompt": "Write.", "completion": "ref"}, "Write.", "ref"),
        (
            {"messages": [{"role": "user", "content": "Write."}, {"role": "assistant", "content": "ref"}]},
            "Write.",
            "ref",
        ),
        ({"conversations": [{"from": "human", "value": "Write."}]}, "Write.", None),
        *(
            ({"conversations": [{"from": "human", "value": "Write."}, {"from": name, "value": "ref"}]}, "Write.", "ref")
            for name, role in ROLES.items()
            if role == "assistant"
        ),
        ({"prompt": [{"role": "user", "content": "Write."}]}, "Write.", None),
    ],
)
def test_predictions_stand_in_for_answers(
    folder: Path, row: dict[str, Any], prompt: str, reference: str | None
) -> None:
    (folder / SAMPLES).unlink()
    write_jsonl(folder / "predictions_before.jsonl", [{**row, "answer": "earlier"}])
    write_jsonl(folder / "predictions_after.jsonl", [{**row, "answer": "later"}, {**row, "summed_loss": 1.0}])
    (answers,) = report_module.read_run(folder).answers
    assert (answers.prompt, answers.reference) == (prompt, reference)
    assert (answers.before, answers.after) == ("earlier", "later")
    assert_sound(page_of(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"step": 1,\n', encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        write_page(folder)
    assert not (folder / PAGE).exists()


def test_a_line_without_what_it_should_hold_is_named(folder: Path) -> None:
    (folder / SAMPLES).write_text('{"step": 1, "prompt": "p"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"{SAMPLES}:1: answer is missing"):
        write_page(folder)


@pytest.mark.parametrize("name", [METRICS, SAMPLES])
def test_a_last_line_that_is_cut_within_a_character_is_left_out(folder: Path, name: str) -> None:
    whole = write_page(folder).read_bytes()
    with (folder / name).open("ab") as file:
        file.write('{"step": 300, "prompt": "写'.encode()[:-1])
    assert write_page(folder).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (METRICS, {"step": "300", "loss": 1.0}, "step is '300', not a whole number"),
        (METRICS, {"step": 10**20, "loss": 1.0}, "not a whole number"),
        (METRICS, {"step": 300, "loss": "low"}, "could not convert string to float"),
        (METRICS, {"step": 300, "eval_loss": [1.0]}, "this line is broken"),
        (SAMPLES, {"step": [1], "prompt": "p", "answer": "a"}, "not a whole number"),
        (SAMPLES, {"step": 1, "prompt": ["p"], "answer": "a"}, "prompt is not text"),
    ],
)
def test_a_line_with_something_else_in_it_is_named(folder: Path, name: str, line: dict[str, Any], message: str) -> None:
    write_jsonl(folder / name, [line])
    with pytest.raises(UserError, match=rf"{name}:1: .*{re.escape(message)}"):
        write_page(folder)


def test_numbers_as_text_are_numbers(folder: Path) -> None:
    write_jsonl(folder / METRICS, [{"step": 1, "loss": "nan", "tokens": "7"}, {"step": 2, "eval_loss": "NaN"}])
    curves = report_module.read_run(folder).curves
    assert math.isnan(curves.values["loss"][0])
    assert curves.values["tokens"][0] == 7
    assert math.isnan(curves.eval_losses[0])
    assert_sound(page_of(folder))


@pytest.mark.parametrize(("rows", "counted"), [(1, "1 row"), (4, "4 rows")])
def test_the_evaluation_says_on_what_it_rests(folder: Path, rows: int, counted: str) -> None:
    content = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    nothing = {"value": 0.0, "interval": [0.0, 0.0]}
    content["metrics"] = {"exact match %": dict.fromkeys(("before", "after", "difference"), nothing)}
    content["metrics"]["exact match %"]["difference_excludes_zero"] = False
    (folder / EVALUATION).write_text(
        json.dumps({**content, "rows": rows, "data": {"小店.jsonl": "0"}}), encoding="utf-8"
    )
    page = page_of(folder)
    assert f"Over {counted} of 小店.jsonl." in page.text
    assert f"共评估 {rows} 行" in page.text
    assert "+0 " not in page.text
    assert "[+0" not in page.text
    assert_sound(page)


def test_text_that_runs_from_right_to_left_is_shown_so(folder: Path) -> None:
    page = page_of(folder)
    texts = [attributes for _, attributes in page.tags if "text" in attributes.get("class", "").split()]
    assert len(texts) > 3
    assert all(attributes.get("dir") == "auto" for attributes in texts)


@pytest.mark.parametrize("metrics", [{"BLEU": 3.2}, {"BLEU": {"after": 3.2}}, [3.2], {"BLEU": WITH_TEXT}])
def test_an_evaluation_of_another_kind_is_named(folder: Path, metrics: Any) -> None:
    (folder / EVALUATION).write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{EVALUATION}: `qingtune evaluate` did not write this"):
        write_page(folder)


def test_a_page_that_cannot_be_written_is_told(folder: Path) -> None:
    (folder / PAGE).mkdir()
    with pytest.raises(UserError, match=r"report\.html: this is a folder"):
        write_page(folder)
    assert not list(folder.glob(".*.tmp"))


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_opens_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    report(ReportConfig(output_dir=str(folder)))
    assert capsys.readouterr() == (f"{folder / PAGE}\n", "")
    assert opened == []
    report(ReportConfig(output_dir=str(folder), open=True))
    assert opened == [(folder / PAGE).as_uri()]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training run here"):
        report(ReportConfig(output_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_command_loads_nothing_heavy(folder: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    heavy = {"torch", "transformers", "matplotlib", "pyarrow", "rich"}
    code = f"import sys; from qingtune.cli import main; main(); print({heavy} & set(sys.modules), file=sys.stderr)"
    ended = run("-c", code, "report", "--output_dir", folder)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{folder / PAGE}\n", "set()\n")


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())
    monkeypatch.setattr("qingtune.files.write.os.fsync", _no_room)
    with pytest.raises(UserError, match=r"report\.html could not be written: No space left on device"):
        report(ReportConfig(output_dir=str(folder)))
    assert sorted(folder.iterdir()) == before


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- During a run ----------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_made_is_told_once_and_ends_nothing(
    folder: Path, reported: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = PageOfRun(folder)
    monkeypatch.setattr(report_module, "render", lambda _: 1 / 0)
    assert [page.write(), page.write()] == [False, False]
    assert reported() == ["Warning: report.html was not written: ZeroDivisionError: division by zero"]
    monkeypatch.undo()
    monkeypatch.setattr(report_module, "write_text", _no_room)
    assert not page.write()
    assert "No space left on device" in reported()[1]
    monkeypatch.undo()
    assert page.write()
    assert len(reported()) == 2


def test_a_page_takes_little_of_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, 0

    def write_slowly(_: Path) -> None:
        nonlocal now, written
        now, written = now + 2.0, written + 1

    monkeypatch.setattr(report_module, "write_page", write_slowly)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    page = PageOfRun(folder)
    for _ in range(1000):
        page(object())
        now += 1.0
    assert written == 5


# --- Numbers as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.01234"), (1.5792, "1.579"), (12340.0, "12,340"), (1.2e-5, "1.2e-05"),
     (3e9, "3e+09"), (-2.5, "-2.500"), (float("nan"), "–"), (float("inf"), "–")],
)  # fmt: skip
def test_numbers_of_any_size(value: float, text: str) -> None:
    assert significant(value) == text


def test_sizes_and_durations() -> None:
    assert [size(count) for count in (12_345_678, 99_999_999, 2.62e9, 1.5e12)] == [
        "12.3 MB", "100.0 MB", "2.62 GB", "1,500.00 GB",
    ]  # fmt: skip
    assert [time_taken(seconds) for seconds in (3.21, 93.7, 4180, 50_380)] == [
        ("3.2 s", "3.2 秒"), ("94 s", "94 秒"), ("70 min", "70 分钟"), ("14.0 h", "14.0 小时"),
    ]  # fmt: skip
