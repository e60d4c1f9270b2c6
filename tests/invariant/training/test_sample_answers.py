"""`eval_samples`: answers with the weights of the moment, which change nothing of the run and are there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import instruction_rows, make_tokenizer, write_jsonl
from tiny_runs import LORA, METHODS, assert_equal, metrics, other_model, save_model, train, weights

from qingtune.config.load import load_train_config
from qingtune.data.tokenize import Sample
from qingtune.errors import UserError
from qingtune.training import sample_answers
from qingtune.training.sample_answers import split_last_answer

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "lora_dropout": 0.3,
}
HEAD = {**LORA, "modules_to_save": "lm_head"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_answers, "MOST_TOKENS", 8)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    rows = instruction_rows(14)
    held = write_jsonl(tmp_path / "held.jsonl", rows[10:])
    return {"data": str(write_jsonl(tmp_path / "rows.jsonl", rows[:10])), "eval_data_path": str(held)}


def start(tmp_path: Path, name: str, data: dict[str, str], **settings: Any) -> bool:
    values = COMMON | {"eval_data_path": data["eval_data_path"]} | settings
    if not values.get("use_lora"):
        del values["lora_dropout"]
    return train(tmp_path / name, tmp_path / "model", Path(data["data"]), **values)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "eval_samples.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]


@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("qwen2", method) for method in (*METHODS, "head")), ("gpt2", "full"), ("gpt2", "qlora4")],
)
def test_the_run_is_the_same_with_and_without(tmp_path: Path, data: dict[str, str], kind: str, method: str) -> None:
    settings = HEAD if method == "head" else METHODS[method]
    save_model(tmp_path / "model", kind)
    state = torch.get_rng_state()
    assert start(tmp_path, "without", data, **settings)
    torch.set_rng_state(state)
    assert start(tmp_path, "with", data, **settings, eval_samples=3)
    assert_equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "eval_samples.jsonl").exists()
    assert [line["step"] for line in lines(tmp_path / "with")] == [0, 0, 0, 2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_answers_are_those_of_the_weights_of_the_moment(tmp_path: Path, data: dict[str, str], kind: str) -> None:
    import transformers

    folder = save_model(tmp_path / "model", kind)
    start(tmp_path, "run", data, eval_samples=4, learning_rate=0.03)
    found = lines(tmp_path / "run")
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in Path(data["eval_data_path"]).read_text(encoding="utf-8").split("\n") if line]
    for step, place in ((0, folder), (4, tmp_path / "run")):
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        for row, line in zip(rows, [line for line in found if line["step"] == step], strict=True):
            asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            assert line["prompt"] == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            assert line["reference"] == row["output"]
            ids = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)
            made = model.generate(**ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.1)[0]
            made = made[ids["input_ids"].shape[1] :]
            assert line["answer"] == tokenizer.decode(made, skip_special_tokens=True)
    assert [line["answer"] for line in found[:4]] != [line["answer"] for line in found[-4:]]


@pytest.mark.parametrize("half", ["", '{"step": 2, "prompt": "half'])
def test_a_resumed_run_has_each_line_once(tmp_path: Path, data: dict[str, str], half: str) -> None:
    save_model(tmp_path / "model")
    settings = {**LORA, "eval_samples": 2, "save_total_limit": None}
    start(tmp_path, "whole", data, **settings)
    start(tmp_path, "again", data, **settings)
    folder = tmp_path / "again"
    (folder / "qingtune.json").unlink()  # killed before the result was there; the last checkpoint is gone, too
    for path in (folder / "checkpoint-4").iterdir():
        path.unlink()
    (folder / "checkpoint-4").rmdir()
    with (folder / "eval_samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(half)
    assert start(tmp_path, "again", data, **settings)
    assert lines(folder) == lines(tmp_path / "whole")
    assert start(tmp_path, "again", data, **settings, overwrite_output_dir=True)
    assert lines(folder) == lines(tmp_path / "whole")


def test_models_that_go_one_by_one(tmp_path: Path, data: dict[str, str]) -> None:
    other_model("vaultgemma").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert start(tmp_path, "run", data, **LORA, eval_samples=1, max_steps=2)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 2]


@pytest.mark.parametrize("flags", [{}, {"val_size": "2", "eval_strategy": "no"}])
def test_without_evaluations_there_are_no_answers(flags: dict[str, str]) -> None:
    with pytest.raises(UserError, match="eval_samples needs evaluations"):
        load_train_config(None, {"data_path": "x.jsonl", "eval_samples": "2", **flags})


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("..xx", ([0, 1], [2, 3])),
        (".x.x.", ([0, 1, 2], [3])),
        ("xxxx", None),
        ("....", None),
        ("x..x", ([0, 1, 2], [3])),
    ],
)
def test_the_last_answer_of_a_sample(trained: str, expected: tuple[list[int], list[int]] | None) -> None:
    mask = np.array([mark == "x" for mark in trained])
    assert split_last_answer(Sample(np.arange(len(trained), dtype=np.int32), mask, "row")) == expected
