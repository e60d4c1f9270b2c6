"""Secrets are in no file of a result, and hiding them changes no answer and no run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, train

from qingtune.cli import main
from qingtune.config.load import load_train_config
from qingtune.errors import UserError
from qingtune.runs.record import RECORD, SETTINGS, changed_names, read_record, settings_to_compare, without_secrets

TOKEN = "hf_" + "a1B2c3D4e5" * 3


def files_with(folder: Path, secret: str) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in paths if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_token_in_paths_reaches_no_file_and_the_run_is_known_again(
    method: str, tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / TOKEN
    shutil.copytree(tiny(), place / "model")
    rows = write_jsonl(place / "t.jsonl", instruction_rows(8))
    settings: dict[str, Any] = {"max_steps": 2, "val_size": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= LORA if method == "lora" else {}
    assert train(tmp_path / "out", place / "model", rows, **settings)
    assert files_with(tmp_path / "out", TOKEN) == []
    assert "***" in (tmp_path / "out" / RECORD).read_text()
    assert train(tmp_path / "out", place / "model", rows, **settings)
    assert "This run is already finished" in capsys.readouterr().err
    (tmp_path / "out" / RECORD).unlink()
    with pytest.raises(UserError, match="max_grad_norm was"):
        train(tmp_path / "out", place / "model", rows, **settings, max_grad_norm=2)
    other = write_jsonl(place / "u.jsonl", instruction_rows(8))
    with pytest.raises(UserError, match="data_path was"):
        train(tmp_path / "out", place / "model", other, **settings)
    assert train(tmp_path / "out", place / "model", rows, **settings)
    assert "Resuming from" in capsys.readouterr().err


def test_a_token_in_the_system_prompt_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="system_prompt contains a token of Hugging Face"):
        train(tmp_path / "out", tiny(), data_file, **LORA, system_prompt=f"Use {TOKEN}.")
    monkeypatch.setenv("DB_PASS", "horse-7-battery")
    with pytest.raises(UserError, match="system_prompt contains the value of DB_PASS"):
        train(tmp_path / "out", tiny(), data_file, **LORA, system_prompt="Say horse-7-battery.")
    assert not (tmp_path / "out").exists()


def test_a_password_that_is_a_word_changes_no_run(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = {**LORA, "max_steps": 1, "system_prompt": "You know postgres."}
    with monkeypatch.context() as patch:
        patch.setenv("POSTGRES_PASSWORD", "postgres")
        assert train(tmp_path / "out", tiny(), data_file, **settings)
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.system_prompt == record.settings["system_prompt"] == "You know postgres."
    assert train(tmp_path / "out", tiny(), data_file, **settings)
    assert "This run is already finished" in capsys.readouterr().err


def test_records_of_the_first_version_are_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"model_name_or_path": "m", "data_path": "d/horse-7-battery/t.jsonl", "use_lora": True}))
    now = settings_to_compare(load_train_config(str(file), {}).config, 1, "d", "w")
    first = {**now, "data_path": ["d/***/t.jsonl"]}
    assert changed_names(first, now) == []
    assert changed_names({**first, "data_path": ["d/***/u.jsonl"]}, now) == ["data_path"]
    assert changed_names({**first, "data_path": ["***"]}, {**now, "data_path": "x"}) == ["data_path"]
    monkeypatch.setenv("DB_PASS", "horse-7-battery")
    written = json.loads(json.dumps(without_secrets(now)))
    assert "horse" not in json.dumps(written)
    monkeypatch.delenv("DB_PASS")
    assert changed_names(written, now) == []
    assert changed_names(written, {**now, "data_path": ["d/horse-8-battery/t.jsonl"]}) == ["data_path"]


def test_answers_are_never_redacted(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "instruction")
    monkeypatch.setenv("MY_TOKEN", "horse-7-battery")
    rows = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Say horse-7-battery.", "horse-7-battery": 1}])
    flags = ["infer", "--base_model", str(tiny()), "--prompt_file", str(rows), "--max_new_tokens", "2"]
    assert main(flags) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main([*flags, "--output_file", str(tmp_path / "a.jsonl")]) == 0
    assert shown == json.loads((tmp_path / "a.jsonl").read_text())
    assert shown["instruction"] == "Say horse-7-battery."
    assert shown["horse-7-battery"] == 1


def test_settings_of_a_run_are_written_without_secrets(
    tiny: Callable[..., Path], data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "out", tiny(), data_file, **LORA, max_steps=1, cache_dir=str(tmp_path / TOKEN))
    assert TOKEN not in (tmp_path / "out" / SETTINGS).read_text()
    capsys.readouterr()
    notices = load_train_config(
        None, {"model_name_or_path": f"/x/{TOKEN}/m", "data_path": "d", "use_lora": "true"}
    ).notices
    assert any("model_name_or_path contains what looks like a token of Hugging Face" in line for line in notices)
