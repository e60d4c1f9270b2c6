"""A finished run is known without torch, and only where all that its samples were made of is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, write_jsonl
from tiny_runs import LORA, save_model, train

from qingtune.config.load import load_train_config
from qingtune.training.finished import is_surely_finished


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, its model, data and configuration."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_jsonl(folder / "rows.jsonl", instruction_rows(8))
    train(folder / "output", save_model(folder / "model"), data, max_steps=1, **LORA)
    return folder


def asked(run: Path, **flags: str) -> bool:
    return is_surely_finished(load_train_config(str(run / "output.config.json"), flags).config)


def test_the_same_run_is_known(run: Path) -> None:
    assert asked(run)
    assert asked(run, logging_steps="3", report_to="tensorboard")  # what changes nothing that is computed


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": "2"}, {"learning_rate": "1e-3"}, {"overwrite_output_dir": "true"}, {"dry_run": "true"},
        {"resume_from_checkpoint": "false"}, {"model_name_or_path": "./none"}, {"output_dir": "./none"},
    ],
    ids=lambda flags: next(iter(flags)),
)  # fmt: skip
def test_another_run_is_looked_at_by_the_recipe(run: Path, flags: dict[str, str]) -> None:
    assert not asked(run, **flags)


def spoilt_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record)
        path.write_text(json.dumps(record), encoding="utf-8")

    return spoil


def one_byte_more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def zeros_from_the_middle(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the data": ("rows.jsonl", one_byte_more),
    "data that is gone": ("rows.jsonl", Path.unlink),
    "the tokenizer": ("model/tokenizer.json", one_byte_more),
    "the template": ("model/chat_template.jinja", one_byte_more),
    "the weights": ("model/model.safetensors", zeros_from_the_middle),
    "a record of an earlier version": ("output/qingtune.json", spoilt_record(lambda it: it["results"].pop("inputs"))),
    "another version": ("output/qingtune.json", spoilt_record(lambda it: it["versions"].update(qingtune="0.0.9"))),
    "a broken record": ("output/qingtune.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(run: Path, change: str) -> None:
    name, spoil = CHANGES[change]
    kept = (run / name).read_bytes()
    try:
        spoil(run / name)
        assert not asked(run)
    finally:
        (run / name).write_bytes(kept)
    assert asked(run)
