"""`qingtune check`: what it finds, where it says so, and its exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from qingtune.cli import main
from qingtune.data import check as module

ANSWER = "七点出炉，热的面包，配一杯咖啡，门口的猫也认识每一位来买早餐的客人，欢迎来坐坐，今天的第一炉刚刚好，趁热。"


def row(prompt: str, answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"instruction": prompt, "output": f"{answer}", **more}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Writes rows, checks them; returns the exit code, the report as JSON and the report as text."""
    monkeypatch.chdir(tmp_path)

    def run(rows: list[Any], evaluation: list[Any] | None = None, *flags: str) -> tuple[int, dict[str, Any], str]:
        write_jsonl(Path("a.jsonl"), rows)
        command = ["check", "--data", "a.jsonl", *flags]
        if evaluation is not None:
            write_jsonl(Path("e.jsonl"), evaluation)
            command += ["--eval_data", "e.jsonl"]
        texts: list[str] = []
        code = 0
        for more in (["--json_report"], []):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                code = main([*command, *more])
            texts.append(out.getvalue())
        return code, json.loads(texts[0]), texts[1]

    return run


def test_a_clean_set_has_no_findings(check: Callable[..., Any]) -> None:
    code, report, text = check([row(f"写第{n}条", ANSWER + str(n)) for n in range(20)], None, "--strict")
    assert code == 0
    assert report["Training data"]["faulty"] == 0
    assert text.splitlines()[:3] == [
        "Training data: 20 rows, 0 faults", "  a.jsonl: instruction rows", "  answers by script: Han 20",
    ]  # fmt: skip
    assert len(text.splitlines()) == 4


def test_each_finding_names_its_places(check: Callable[..., Any]) -> None:
    rows = [row(f"写第{n}条", ANSWER + str(n)) for n in range(60)]
    rows[3] = row("写第3条", "")
    rows[5] = row("写第5条", "好")
    rows[7] = rows[6]
    rows[9] = row("写第8条", ANSWER + "另一个")
    rows[11] = row("写第11条", "Fresh bread at seven, coffee at eight, and the cat at the door knows everyone.")
    rows[13] = row("写第13条", ANSWER + "<|im_end|>")
    rows[15] = row("写第15条", "热的面包和咖啡都在这里等你来，再来一块蛋糕吧 Fresh bread coffee")
    code, reports, text = check(rows, [row("写第20条", ANSWER + "20"), row("新的", ANSWER + "新")])
    report = reports["Training data"]
    assert code == 0
    assert report["faults"]["first"] == [
        'a.jsonl:4: "output" is empty', "a.jsonl:14: holds <|im_end|>, a control token of chat templates",
    ]  # fmt: skip
    assert report["near_empty"] == {"count": 1, "first": ["a.jsonl:6"]}
    assert report["repeated"] == {"count": 1, "first": ["a.jsonl:8 = a.jsonl:7"]}
    assert report["other_answer"] == {"count": 1, "first": ["a.jsonl:10, a.jsonl:9"]}
    assert report["rare_script"]["first"] == ["a.jsonl:12 (Latin)"]
    assert report["two_scripts"]["first"] == ["a.jsonl:16 (Han and Latin)"]
    assert reports["Evaluation data"]["in_training"] == {"count": 1, "first": ["e.jsonl:1 = a.jsonl:21"]}
    assert reports["Evaluation data"]["faulty"] == 1
    for line in ("  2 faults:", "    a.jsonl:8 = a.jsonl:7", "  1 evaluation row also in the training data:"):
        assert line in text.splitlines()


def test_strict_makes_a_fault_the_exit_code(check: Callable[..., Any]) -> None:
    assert check([row("a"), {"instruction": "b"}], None, "--strict")[0] == 2
    assert check([row("a"), row("a")], None, "--strict")[0] == 0  # suspicious, but trainable
    assert check([row("a")], [row("a")], "--strict")[0] == 2


def test_tokens_are_counted_as_training_would(check: Callable[..., Any], tiny: Callable[..., Path]) -> None:
    rows = [row(f"写第{n}条", ANSWER[: 5 + n]) for n in range(30)]
    _, plain, _ = check(rows, None, "--model_name_or_path", str(tiny()))
    whole = plain["Training data"]
    assert whole["samples"] == 30
    assert 0 < whole["trained"] < whole["tokens"]
    assert whole["percentiles"]["longest"] > whole["percentiles"]["p50"]
    limit = str(whole["percentiles"]["p50"])
    for on_long, field in (("drop", "too_long"), ("raise", "faults")):
        _, cut, _ = check(
            rows, None, "--model_name_or_path", str(tiny()), "--max_seq_length", limit, "--on_long", on_long
        )
        assert 0 < cut["Training data"][field]["count"] < 30
    _, cut, text = check(
        rows, None, "--model_name_or_path", str(tiny()), "--max_seq_length", limit, "--on_long", "truncate"
    )
    assert cut["Training data"]["truncated"] > 0
    assert "(cut at the end)" in text


def test_far_rows_are_found_in_batches(check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 7)
    rows = [row(f"写第{n}条", ANSWER + str(n)) for n in range(50)]
    _, reports, _ = check([*rows, rows[0]], None, "--model_name_or_path", str(tiny()))
    assert reports["Training data"]["samples"] == 51
    assert reports["Training data"]["repeated"]["first"] == ["a.jsonl:51 = a.jsonl:1"]


def test_progress_goes_to_stderr(
    check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "TELL_EVERY_S", -1.0)
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), [row("a")])
    assert main(["check", "--data", "a.jsonl"]) == 0
    seen = capsys.readouterr()
    assert "a.jsonl: 1 row read in 0 s" in seen.err
    assert "rows read in" not in seen.out


def test_nothing_to_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_no_model_means_no_torch(run: Callable[..., subprocess.CompletedProcess[str]], data_file: Path) -> None:
    code = "import sys; from qingtune.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    assert run("-c", code, "check", "--data", data_file).stdout.splitlines()[-1] == "False"
