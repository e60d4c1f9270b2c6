"""Reading settings from a file and flags: what is accepted, and that every problem is told at once, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qingtune.config import ALIASES, NO_EFFECT, MergeConfig, TrainConfig
from qingtune.config_load import Loaded, check_flags, load_train_config
from qingtune.errors import UserError

DATA = {"data_path": "train.jsonl"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def load(file: Path, content: Any, **flags: str) -> Loaded:
    """Load a file of this content: bytes, text, or an object to be written as JSON."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        file.write_text(text, encoding="utf-8")
    return load_train_config(str(file), flags)


def problems(file: Path, content: Any, **flags: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        load(file, content, **flags)
    return str(caught.value).splitlines()


def silence(**values: Any) -> dict[str, Any]:
    """Settings that leave nothing to tell."""
    return {**DATA, "learning_rate": 1e-4, **values}


# --- Files and flags -------------------------------------------------------------------------------------------------


def test_flags_override_the_file(file: Path) -> None:
    config = load(file, {**DATA, "lora_r": 8, "seed": 1}, lora_r="32", use_lora="true").config
    assert (config.lora_r, config.seed, config.use_lora) == (32, 1, True)


def test_guides_flags_give_what_the_same_file_gives(file: Path) -> None:
    flags = {
        "use_lora": "true",
        "lora_r": "64",
        "lora_alpha": "16",
        "data_path": "data/store_xhs_sft_samples.jsonl",
        "output_dir": "./output_lora",
        "learning_rate": "1e-4",
    }
    same = {**flags, "use_lora": True, "lora_r": 64, "lora_alpha": 16, "learning_rate": 1e-4}
    assert load_train_config(None, flags) == load(file, same)


def test_comments_and_schema_are_passed_over(file: Path) -> None:
    loaded = load(file, silence(_how="so", _lora_r="not a number", **{"$schema": "../docs/train_config.schema.json"}))
    assert loaded == load(file, silence())


def test_byte_order_mark_does_not_matter(file: Path) -> None:
    assert load(file, b"\xef\xbb\xbf" + json.dumps(silence()).encode()) == load(file, silence())


def test_chinese_values_are_read_as_they_are(file: Path) -> None:
    config = load(file, {**DATA, "system_prompt": "你是店主。", "output_dir": "输出"}).config
    assert (config.system_prompt, config.output_dir) == ("你是店主。", "输出")


def test_typical_training_arguments_load(file: Path) -> None:
    content = {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "data_path": ["a.jsonl", "b.csv"],
        "eval_data_path": "c.jsonl",
        "output_dir": "./out",
        "overwrite_output_dir": True,
        "do_train": True,
        "do_eval": False,
        "evaluation_strategy": "steps",
        "eval_steps": 50,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "num_train_epochs": 3,
        "max_steps": -1,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "optim": "adamw_torch",
        "logging_dir": "./logs",
        "logging_strategy": "steps",
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "save_safetensors": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "bf16": True,
        "fp16": False,
        "tf32": True,
        "dataloader_num_workers": 4,
        "dataloader_pin_memory": True,
        "remove_unused_columns": False,
        "group_by_length": True,
        "ddp_find_unused_parameters": False,
        "deepspeed": "ds_zero2.json",
        "disable_tqdm": False,
        "run_name": "first",
        "report_to": ["tensorboard"],
        "resume_from_checkpoint": None,
        "seed": 42,
    }
    loaded = load(file, content)
    assert (loaded.config.eval_strategy, loaded.config.data_path) == ("steps", ["a.jsonl", "b.csv"])
    told = {notice.split()[0] for notice in loaded.notices}
    assert {"group_by_length", "deepspeed", "dataloader_num_workers"} <= told
    assert told.isdisjoint({"do_eval", "disable_tqdm", "ddp_find_unused_parameters"})


# --- Older names, and names without effect ---------------------------------------------------------------------------


@pytest.mark.parametrize(("older", "newer"), ALIASES.items())
def test_older_names_are_understood(file: Path, older: str, newer: str) -> None:
    value: Any = {"eval_strategy": "no", "gradient_checkpointing": True}.get(newer, 3)
    assert load(file, silence(**{older: value})) == load(file, silence(**{newer: value}))
    assert load(file, silence(), **{older: str(value).lower()}).config == load(file, silence(**{newer: value})).config


@pytest.mark.parametrize("kind", ["evaluation_strategy", "eval_strategy"])
def test_a_flag_overrides_the_file_under_either_name(file: Path, kind: str) -> None:
    other = "eval_strategy" if kind == "evaluation_strategy" else "evaluation_strategy"
    assert load(file, silence(val_size=5, **{kind: "no"}), **{other: "steps"}).config.eval_strategy == "steps"


def test_older_and_newer_name_in_one_file_are_one_problem(file: Path) -> None:
    lines = problems(file, silence(evaluation_strategy="no", eval_strategy="steps"))
    assert lines == [f'{file}: "evaluation_strategy" is the older name of "eval_strategy"; both are given']


def test_an_older_name_is_called_by_its_name_when_its_value_is_wrong(file: Path) -> None:
    (line,) = problems(file, silence(per_gpu_train_batch_size="many"))
    assert line.startswith(f"{file}: ")
    assert "train_batch_size" in line


ASKED: dict[str, Any] = {"dataloader_num_workers": 2, "deepspeed": "ds.json"}


@pytest.mark.parametrize("name", sorted(set(NO_EFFECT) - {"remove_unused_columns"}))
def test_name_without_effect_is_told_in_one_line_if_it_asks_for_something(file: Path, name: str) -> None:
    loaded = load(file, silence(**{name: ASKED.get(name, True)}))
    assert loaded.notices == (f"{name} has no effect here: {NO_EFFECT[name]}.",)
    unchanged = load(file, silence()).config.model_dump(exclude=set(ASKED))
    assert loaded.config.model_dump(exclude=set(ASKED)) == unchanged


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
def test_name_without_effect_is_silent_if_inert(file: Path, value: object) -> None:
    # Those that are settings too have their values checked; the others take anything.
    names = sorted(set(NO_EFFECT) - set(TrainConfig.model_fields))
    assert load(file, silence(**dict.fromkeys(names, value))).notices == ()


@pytest.mark.parametrize("typed", ["false", "0", "none"])
def test_flag_without_effect_is_silent_if_inert(file: Path, typed: str) -> None:
    assert load(file, silence(), group_by_length=typed).notices == ()


def test_default_values_of_names_without_effect_are_silent(file: Path) -> None:
    inert = silence(dataloader_num_workers=0, deepspeed=None, remove_unused_columns=True)
    assert load(file, inert).notices == ()
    assert load(file, silence(), remove_unused_columns="true", dataloader_num_workers="0").notices == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5), ("optim_args", "x=1"), ("data_seed", 7)],
)
def test_names_that_would_change_a_result_are_refused(file: Path, name: str, value: object) -> None:
    (line,) = problems(file, silence(**{name: value}))
    assert line.startswith(f'{file}: "{name}" is not a setting')


# --- resume_from_checkpoint: a switch and a path in one ---------------------------------------------------------------


@pytest.mark.parametrize(("typed", "value"), [("false", False), ("true", True), ("auto", "auto"), ("out/c", "out/c")])
def test_resume_flag_is_read_as_the_help_says(typed: str, value: object) -> None:
    assert load_train_config(None, DATA | {"resume_from_checkpoint": typed}).config.resume_from_checkpoint == value


@pytest.mark.parametrize("schema_flags", [{}, {"lora_model": "a"}, {"output_dir": "b"}])
def test_missing_flags_are_all_named(schema_flags: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        check_flags(MergeConfig, schema_flags)
    for name in {"lora_model", "output_dir"} - set(schema_flags):
        assert f"--{name} is missing" in str(caught.value)
    for name in schema_flags:
        assert f"--{name}" not in str(caught.value)


# --- Problems --------------------------------------------------------------------------------------------------------


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
        ({"eval_strategy": "epoch"}, "nothing to evaluate on"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        ({"load_best_model_at_end": True, "val_size": 5, "eval_strategy": "no"}, 'eval_strategy is "no"'),
        ({"greater_is_better": True}, "greater_is_better is true"),
        ({"max_steps": 0}, "max_steps is 0"),
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
        ('{"lora_r": 1, "lora_r": 2}', "", '"lora_r" stands there twice'),
        ('{"deepspeed": {"a": 1, "a": 2}}', "", '"a" stands there twice'),
        ("[]", "", "a JSON object is wanted"),
        ("null", "", "a JSON object is wanted"),
        ('"lora_r"', "", "a JSON object is wanted"),
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
    with pytest.raises(UserError, match="cannot be read"):
        load_train_config(str(tmp_path), {})
