"""Values and files of the wrong kind, in arguments, settings, records and folders, are refused in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_run

from qingtune.config.commands import InferConfig
from qingtune.config.load import check_flags, load_train_config
from qingtune.data.prompts import rows_with_prompts
from qingtune.errors import UserError, raise_all
from qingtune.files.digests import sha256_of
from qingtune.machine.describe import launched_processes
from qingtune.runs.page.write import write_page
from qingtune.runs.record import FACTS, METRICS, SAMPLES, SETTINGS, Record, read_record, write_record
from qingtune.training import checkpoint
from qingtune.training.events import LinesFile

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pytest.mark.parametrize("name", ["prompt", "system_prompt"])
def test_bytes_of_a_prompt_that_are_not_utf8_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f'"{name}" .*not UTF-8'):
        check_flags(InferConfig, {"base_model": "model", name: "\udcff"})


def test_a_system_prompt_of_training_is_utf8() -> None:
    with pytest.raises(UserError, match=r'"system_prompt" .*not UTF-8'):
        load_train_config(None, {"model_name_or_path": "m", "output_dir": "o", "system_prompt": "\udcff"})


def test_many_problems_are_counted() -> None:
    with pytest.raises(UserError) as caught:
        raise_all([UserError(f"problem {number}") for number in range(5000)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 4,980 more"


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "x"), ("WORLD_SIZE", "-5")])
def test_a_launchers_variable_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"variable {name}: '{value}' is not a whole number of at least"):
        launched_processes()


@needs_pipes
def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        sha256_of(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        load_train_config(str(tmp_path / "pipe"), {})


@needs_pipes
@pytest.mark.parametrize("name", [METRICS, SAMPLES])
def test_a_page_does_not_wait_for_a_pipe(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: this is not a regular file"):
        write_page(folder)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (SETTINGS, "eval_data_path", [5]),
        (FACTS, "total_steps", "x"),
        (FACTS, "machine", {"memory_bytes": []}),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, name: str, field: str, value: Any) -> None:
    path = write_run(tmp_path / "run") / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with pytest.raises(UserError, match=name):
        write_page(path.parent)


@pytest.mark.parametrize("line", ["precious", "[]", "{}", '{"step": "x"}'])
def test_a_log_to_keep_that_is_broken_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / SAMPLES
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{SAMPLES}:1"):
        LinesFile(path, keep_to_step=1)
    assert path.read_text(encoding="utf-8") == f"{line}\n"


def test_a_log_to_keep_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text('{"step": 1}\n', encoding="utf-8")
    (tmp_path / SAMPLES).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="this is a link"):
        LinesFile(tmp_path / SAMPLES, keep_to_step=1)


@pytest.mark.parametrize("step", [-1, "x", 3.5, None])
def test_a_checkpoint_counts_its_steps(tmp_path: Path, step: Any) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    progress = {"step": step, "best_loss": None, "best_step": None, "bad_steps": 0, "unlogged": []}
    state = {"progress": progress, "settings": {}, "versions": {}}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    checkpoint.write_manifest(folder)
    with pytest.raises(UserError, match="not a complete checkpoint: step is not"):
        checkpoint.read_state(folder)


def test_half_a_surrogate_pair_in_a_row_to_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "\\ud83c"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*surrogate"):
        list(rows_with_prompts(str(path)))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("settings", "use_qlora", 10**30),
        ("settings", "eval_data_path", 5),
        ("settings", "val_size", "x"),
        ("settings", "lora_r", 0),
        ("results", "parameters", "x"),
    ],
)
def test_a_records_value_of_another_kind_is_named(tmp_path: Path, part: str, name: str, value: Any) -> None:
    record = Record("lora", "base", "0123", None, "chat", [2], {}, {})
    write_record(tmp_path, replace(record, **{part: {name: value}}))
    with pytest.raises(UserError, match=f'{part}: "{name}" is'):
        read_record(tmp_path)
