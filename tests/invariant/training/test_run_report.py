"""Training writes its page: at the end, on the way, and if it breaks off; and no fault of the page costs the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import instruction_rows, write_jsonl
from page_text import Page
from tiny_runs import LORA, train

from qingtune.runs.page.write import write_page
from qingtune.runs.record import FACTS, PAGE, RECORD


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "t.jsonl", [*instruction_rows(12), {"instruction": "q", "output": ""}])


def test_a_run_writes_its_page(
    tiny: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "小店"
    assert train(output, tiny(), rows, **LORA, max_steps=3, val_size=2, on_bad_row="skip")
    assert capsys.readouterr().out.splitlines()[-3] == f"Report: {output / PAGE}"
    text = (output / PAGE).read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == []
    assert "小店" in page.text
    assert "held out of the training data" in page.text
    assert f'{rows}:13: "output" is empty' in page.text
    assert "not finished" not in page.text
    assert write_page(output).read_text(encoding="utf-8") == text
    facts = json.loads((output / FACTS).read_text(encoding="utf-8"))
    training, evaluation = facts["data"]["training"], facts["data"]["evaluation"]
    assert (training["rows_read"], training["faults"]) == (13, 1)
    assert (training["summary"]["samples"], evaluation["summary"]["samples"]) == (10, 2)
    assert sum(count for _, count in training["summary"]["histogram"]) == 10
    assert training["formats"] == {str(rows): "instruction"}
    assert facts["total_steps"] == 3
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["device"].startswith("CPU")


def test_a_run_that_breaks_off_has_a_page(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qingtune.runs.page.write.MOST_OF_THE_TIME", float("inf"))
    monkeypatch.setattr("qingtune.commands.train.save_result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "out", tiny(), data_file, **LORA, max_steps=2)
    page = Page((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    assert "This run is not finished" in page.text
    assert "{{" not in page.text  # the template's placeholders, all filled
    assert not (tmp_path / "out" / RECORD).exists()


def test_a_fault_of_the_page_costs_nothing_but_a_warning(
    tiny: Callable[..., Path],
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qingtune.runs.page.write.render", lambda _: 1 / 0)
    assert train(tmp_path / "out", tiny(), data_file, **LORA, max_steps=1)
    out, err = capsys.readouterr()
    assert err.count("Warning: report.html was not written: ZeroDivisionError: division by zero") == 1
    assert "Report:" not in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / PAGE).exists()
