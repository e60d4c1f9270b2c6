"""Wrong configurations: every problem is told at once, each with its place, before anything else is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qingtune.config.commands import ExportConfig, MergeConfig
from qingtune.config.load import check_flags, load_train_config
from qingtune.errors import UserError

DATA = {"data_path": "train.jsonl"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def problems(file: Path, content: Any, **flags: str) -> list[str]:
    """The lines of the error that a file gives: of bytes, of text, or of an object to be written as JSON."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_train_config(str(file), flags)
    return str(caught.value).splitlines()


def test_all_problems_come_at_once_each_with_its_place(file: Path) -> None:
    content = {"lora_rnak": 8, "zzz": 1, "lora_r": "many", "use_lora": 3, "bf16": True, "fp16": True, "max_steps": 0}
    lines = problems(file, content, lora_dropout="2", nonsense="true")
    told = {
        '"lora_rnak" is not a setting. Did you mean "lora_r"?': file,
        '"zzz" is not a setting': file,
        '"lora_r" is "many"': file,
        '"use_lora" is 3': file,
        '"lora_dropout" is "2"': "--lora_dropout",
        '"nonsense" is not a setting': "--nonsense",
        "bf16 and fp16 are both true": file,
        "max_steps is 0": file,
        "data_path is missing": file,
    }
    assert len(lines) == len(told)
    for what, where in told.items():
        assert [line for line in lines if line.startswith(f"{where}: {what}")], what


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lora_rnak", "lora_r"),
        ("lora_rank", "lora_r"),
        ("learning_rat", "learning_rate"),
        ("data_paths", "data_path"),
        ("evaluation_stratgy", "evaluation_strategy"),
    ],
)
def test_nearest_name_is_proposed(file: Path, typed: str, meant: str) -> None:
    assert problems(file, {**DATA, typed: 1}) == [f'{file}: "{typed}" is not a setting. Did you mean "{meant}"?']


@pytest.mark.parametrize(("typed", "meant"), [("q4_k_x", "q4_k_s"), ("q8", "q8_0"), ("Q5_KM", "q5_k_m")])
def test_of_choices_the_nearest_is_proposed(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf'"quantize" is .*should be .*Did you mean "{meant}"\?$'):
        check_flags(ExportConfig, {"output_dir": "out", "quantize": f"f16,{typed}"})


def test_a_choice_like_no_other_is_not_guessed_at() -> None:
    with pytest.raises(UserError, match=r"should be .*'q3_k_m'$"):
        check_flags(ExportConfig, {"output_dir": "out", "quantize": "xyzzy"})


def test_a_name_like_no_other_is_not_guessed_at(file: Path) -> None:
    (line,) = problems(file, {**DATA, "xyzzy": 1})
    assert "Did you mean" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", True),
        ("learning_rate", False),
        ("val_size", True),
        ("quantization_bit", True),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("lora_r", float("nan")),
        ("lora_r", 16.5),
        ("lora_r", None),
        ("lora_r", [8]),
        ("lora_r", 0),
        ("use_lora", "perhaps"),
        ("use_lora", 2),
        ("optim", "adam"),
        ("quantization_bit", 5),
        ("data_path", 5),
        ("data_path", {"train": "a.jsonl"}),
        ("lora_target_modules", [1]),
        ("output_dir", ""),
        ("output_dir", None),
        ("dataloader_num_workers", "many"),
        ("system_prompt", ["be kind"]),
        ("seed", -1),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", False),
        ("loraplus_lr_ratio", 0.5),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"(": 8}),
        ("rank_pattern", "q_proj"),
        ("rank_pattern", "{"),
        ("alpha_pattern", {"q_proj": "much"}),
        ("alpha_pattern", [8]),
        ("layers_to_transform", "first"),
        ("layers_to_transform", "3-1"),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", True),
        ("lora_alpha", 0),
        ("lora_alpha", 1e9),
        ("lora_dropout", 1),
        ("weight_decay", 10),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.5),
        ("warmup_steps", -1),
        ("max_grad_norm", -1),
        ("max_grad_norm", float("inf")),
        ("num_train_epochs", 1e9),
        ("num_train_epochs", float("nan")),
        ("max_steps", 10**12),
        ("adam_epsilon", 1e3),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("rank_pattern", {"q_proj": 10**6}),
    ],
)
def test_wrong_value_is_one_problem_that_shows_it(file: Path, name: str, value: object) -> None:
    assert len(lines := problems(file, {**DATA, name: value})) == 1
    assert lines[0].startswith(f'{file}: "{name}" is {json.dumps(value)}: ')


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"eval_data_path": "e.jsonl", "val_size": 5}, "eval_data_path and val_size are both given"),
        ({"val_size": 1.5}, "neither a share below 1 nor a whole number"),
        ({"eval_strategy": "epoch"}, "no evaluation data"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"load_best_model_at_end": True, "val_size": 5, "eval_strategy": "no"}, 'eval_strategy is "no"'),
        ({"greater_is_better": True}, "greater_is_better is true"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"shard": "layers", "fp16": True}, "fp16 scales losses"),
        ({"shard": "layers", "val_size": 5, "eval_samples": 2}, "eval_samples answers in one process"),
        ({"samples_per_step": 8, "gradient_accumulation_steps": 2}, "Remove gradient_accumulation_steps."),
        ({"learning_rate": 5}, "learning_rate 5 moves every weight by about that much in each AdamW step"),
        ({"learning_rate": 0.1, "use_lora": True, "loraplus_lr_ratio": 16}, "0.1 times loraplus_lr_ratio 16 moves"),
        ({"use_dora": True}, "use_dora needs adapters. Set use_lora or use_qlora."),
        ({"rank_pattern": {"q_proj": 2}, "modules_to_save": "norm"}, "rank_pattern, modules_to_save need adapters"),
        ({"use_qlora": True, "init_lora_weights": "pissa"}, "then be quantised again"),
        ({"use_qlora": True, "init_lora_weights": "olora"}, "Choose use_lora, or another init_lora_weights."),
        ({"data_path": ""}, "data_path is missing"),
        ({"data_path": []}, "data_path is missing"),
    ],
)
def test_conflict_is_one_problem_with_its_place(file: Path, values: dict[str, Any], what: str) -> None:
    (line,) = problems(file, DATA | values)
    assert line.startswith(f"{file}: ")
    assert what in line


def test_conflict_of_flags_names_the_flag(file: Path) -> None:
    (line,) = problems(file, {**DATA, "fp16": True}, bf16="true")
    assert line.startswith(("--bf16: ", f"{file}: "))
    (line,) = problems(file, DATA, max_steps="0")
    assert line.startswith("--max_steps: max_steps is 0")


def test_nothing_given_at_all_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="data_path is missing"):
        load_train_config(None, {})


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('{"data_path": "a",\n "lora_r": }', ":2:", "not valid JSON"),
        ('{"data_path": "a"\n "lora_r": 1}', ":2:", "not valid JSON"),
        ("", ":1:1", "not valid JSON"),
        ('{"lora_r": 1, "lora_r": 2}', "", '"lora_r" is given twice'),
        ('{"deepspeed": {"a": 1, "a": 2}}', "", '"a" is given twice'),
        ("[]", "", "a JSON object is expected"),
        ("null", "", "a JSON object is expected"),
        ('"lora_r"', "", "a JSON object is expected"),
        ("店".encode("gbk"), "", "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "", "not UTF-8 text"),
        ("[" * 100_000, "", "not valid JSON"),
        ('{"seed": ' + "1" * 5_000 + "}", "", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_file_that_is_no_configuration(file: Path, content: str | bytes, where: str, what: str) -> None:
    (line,) = problems(file, content)
    assert line.startswith(f"{file}{where}")
    assert what in line


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file") as caught:
        load_train_config(str(tmp_path / "none.json"), {})
    assert str(caught.value).startswith(f"{tmp_path / 'none.json'}: ")
    with pytest.raises(UserError, match="not a regular file"):
        load_train_config(str(tmp_path), {})


def test_older_and_newer_name_in_one_file_are_one_problem(file: Path) -> None:
    lines = problems(file, {**DATA, "evaluation_strategy": "no", "eval_strategy": "no"})
    assert lines == [f'{file}: "evaluation_strategy" is the old name of "eval_strategy"; both are given']


def test_an_older_name_is_called_by_its_name_when_its_value_is_wrong(file: Path) -> None:
    (line,) = problems(file, {**DATA, "per_gpu_train_batch_size": "many"})
    assert line.startswith(f"{file}: ")
    assert "train_batch_size" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5), ("optim_args", "x=1"), ("data_seed", 7)],
)
def test_names_that_would_change_a_result_are_refused(file: Path, name: str, value: object) -> None:
    (line,) = problems(file, {**DATA, name: value})
    assert line.startswith(f'{file}: "{name}" is not a setting')


@pytest.mark.parametrize("given", [{}, {"lora_model": "a"}, {"output_dir": "b"}])
def test_missing_flags_are_all_named(given: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        check_flags(MergeConfig, given)
    for name in {"lora_model", "output_dir"} - set(given):
        assert f"--{name} is missing" in str(caught.value)
    for name in given:
        assert f"--{name}" not in str(caught.value)
