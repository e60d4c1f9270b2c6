"""Names that are not UTF-8 are refused in one line: libraries in Rust open none, and no record can hold one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, save_model, train

from qingtune.cli import main

NOT_UTF_8 = os.fsdecode(b"\xff")


@pytest.mark.skipif(sys.platform != "linux", reason="file systems that take any bytes as a name")
def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, model, adapter = instruction_rows(6), save_model(tmp_path / "model"), tmp_path / "adapter"
    data, odd = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / f"odd{NOT_UTF_8}"
    odd_data = write_jsonl(tmp_path / f"odd{NOT_UTF_8}.jsonl", rows)
    train(adapter, model, data, max_steps=1, **LORA)
    odd_model = shutil.copytree(model, tmp_path / f"model{NOT_UTF_8}")
    odd_adapter = shutil.copytree(adapter, tmp_path / f"adapter{NOT_UTF_8}")
    (tmp_path / "linked").symlink_to(odd)
    before = sorted(tmp_path.iterdir())
    training = ("train", "--use_lora", "true", "--model_name_or_path", model)
    for command, said in (
        ((*training, "--data_path", data, "--output_dir", odd), "output_dir"),
        ((*training, "--data_path", odd_data, "--output_dir", tmp_path / "a"), "the path of data_path is not UTF-8"),
        (("merge", "--lora_model", adapter, "--output_dir", odd), "output_dir"),
        (
            ("merge", "--lora_model", adapter, "--output_dir", tmp_path / "linked"),
            "the path of output_dir is not UTF-8",
        ),
        (("infer", "--base_model", odd_model, "--prompt", "Hello"), "the path of the model is not UTF-8"),
        (("infer", "--lora_model", odd_adapter, "--prompt", "Hello"), "the path of the adapter is not UTF-8"),
    ):
        assert main([str(arg) for arg in command]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert said in line
        assert sorted(tmp_path.iterdir()) == before
