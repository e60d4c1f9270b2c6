"""What 0.1.0 wrote opens today: a checkpoint is resumed to its end, results are recognised and compute the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_runs import assert_close, losses, metrics, weights, without_gpu

from qingtune.answering import speaker
from qingtune.cli import main
from qingtune.kernels.device import Hardware
from qingtune.runs.record import read_record


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what 0.1.0 wrote, as the current folder, since paths in it are relative."""
    folder = Path(shutil.copytree(ROOT / "tests" / "fixtures" / "0.1.0", tmp_path / "0.1.0"))
    monkeypatch.chdir(folder)
    fp32 = Hardware(torch.device("cpu"), torch.float32, "fp32")
    monkeypatch.setattr(speaker, "choose_hardware", lambda: fp32)
    return folder


def train(name: str) -> int:
    with without_gpu():
        return main(["train", "--config_file", f"{name}.json"])


def test_a_checkpoint_is_resumed_to_the_same_end(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("stopped") == 0
    assert "step 1/4" not in capsys.readouterr().err
    assert losses(written / "stopped") == pytest.approx(losses(written / "lora"), abs=1e-5)
    assert_close(weights(written / "stopped"), weights(written / "lora"), share=1e-4)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_finished_run_is_recognised(name: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (written / name).rglob("*") if path.is_file()}
    assert train(name) == 0
    assert "already finished" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (written / name).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("name", "model"), [("lora", "lora_model"), ("full", "base_model")])
def test_a_result_computes_what_it_did(name: str, model: str, written: Path) -> None:
    record = read_record(written / name)
    assert record is not None
    assert (record.method, record.base_model) == (name, "base")
    flags = [f"--{model}", name, "--data", "eval.jsonl", "--output_dir", "out", "--skip_generation"]
    assert main(["evaluate", *flags]) == 0
    content: dict[str, Any] = json.loads((written / "out" / "evaluation.json").read_text(encoding="utf-8"))
    last = [line["eval_loss"] for line in metrics(written / name) if "eval_loss" in line][-1]
    assert content["metrics"]["loss"]["after"]["value"] == pytest.approx(last, abs=1e-5)
