"""Reading settings from a file and flags: what is accepted, and what is told about it."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from qingtune.config.load import Loaded, load_train_config
from qingtune.config.no_effect import NO_EFFECT
from qingtune.config.training import ALIASES, TrainConfig
from qingtune.errors import UserError
from qingtune.files.json_files import MOST_BYTES

DATA = {"data_path": "train.jsonl"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def load(file: Path, content: dict[str, Any], **flags: str) -> Loaded:
    """Load a file of this content."""
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return load_train_config(str(file), flags)


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
    plain = load(file, silence())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_train_config(str(file), {}) == plain


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
        "seed": 42,
    }
    loaded = load(file, content)
    assert (loaded.config.eval_strategy, loaded.config.data_path) == ("steps", ["a.jsonl", "b.csv"])
    (told,) = (notice for notice in loaded.notices if notice.startswith("No effect here: "))
    assert all(name in told for name in ("group_by_length", "deepspeed", "dataloader_num_workers"))
    assert not any(name in told for name in ("do_eval", "disable_tqdm", "ddp_find_unused_parameters"))


@pytest.mark.parametrize(
    ("typed", "warned"),
    [
        ({"data_path": "mine.jsonl"}, True),
        ({"data_path": "mine.jsonl", "eval_data_path": "held.jsonl"}, False),
        ({"data_path": "mine.jsonl", "eval_data_path": "null", "val_size": "0.1"}, False),
        ({"data_path": "mine.jsonl", "eval_strategy": "no"}, False),
        ({"output_dir": "mine"}, False),
    ],
)
def test_evaluation_data_of_the_file_is_named_where_a_flag_replaced_only_the_training_data(
    typed: dict[str, str], warned: bool, file: Path
) -> None:
    loaded = load(file, silence(eval_data_path="data/theirs.jsonl", eval_strategy="epoch"), **typed)
    told = [notice for notice in loaded.notices if "evaluation data" in notice]
    start = f"Warning: the evaluation data is still data/theirs.jsonl, from {file}. Pass --eval_data_path FILE, or "
    assert [notice.startswith(start) for notice in told] == [True] * warned
    if "val_size" in typed:  # what the warning advises
        assert (loaded.config.eval_data_path, loaded.config.val_size) == (None, 0.1)


# --- Pipes, and files where pipes usually are ---------------------------------------------------------------------

SHARED_MEMORY = Path("/dev/shm")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@needs_pipes
def test_a_pipe_that_is_written_to_is_read_to_its_end(file: Path) -> None:
    """As in --config_file <(command), whose /dev/fd/63 is open before anything is written."""
    plain = load(file, silence())
    reading, writing = os.pipe()
    with ThreadPoolExecutor() as pool, open(reading):
        loading = pool.submit(load_train_config, f"/dev/fd/{reading}", {})
        with open(writing, "wb") as pipe:
            time.sleep(0.1)
            pipe.write(file.read_bytes())
        assert loading.result(timeout=20) == plain


@needs_pipes
@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_what_a_file_is_does_not_follow_from_its_path() -> None:
    with TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        file, pipe, large = (Path(folder, name) for name in ("config.json", "pipe", "large.json"))
        assert load(file, silence()).config.learning_rate == 1e-4
        large.write_bytes(b" " * (MOST_BYTES + 1))
        os.mkfifo(pipe)
        for path, what in (
            (large, "has more than 2 MB"),
            (Path(folder), "not a regular file"),
            (pipe, "nothing was wr"),
        ):
            with pytest.raises(UserError, match=what):
                load_train_config(str(path), {})


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


ASKED: dict[str, Any] = {"dataloader_num_workers": 2, "deepspeed": "ds.json"}


@pytest.mark.parametrize("name", sorted(set(NO_EFFECT) - {"remove_unused_columns"}))
def test_name_without_effect_is_told_in_one_line_if_it_asks_for_something(file: Path, name: str) -> None:
    loaded = load(file, silence(**{name: ASKED.get(name, True)}))
    assert loaded.notices == (f"No effect here: {name} ({NO_EFFECT[name]}).",)
    unchanged = load(file, silence()).config.model_dump(exclude=set(ASKED))
    assert loaded.config.model_dump(exclude=set(ASKED)) == unchanged


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
def test_name_without_effect_is_silent_if_inert(file: Path, value: object) -> None:
    # Those that are settings too have their values checked; the others take anything.
    names = sorted(set(NO_EFFECT) - set(TrainConfig.model_fields))
    assert load(file, silence(**dict.fromkeys(names, value))).notices == ()


@pytest.mark.parametrize("typed", ["false", "0", ""])
def test_flag_without_effect_is_silent_if_inert(file: Path, typed: str) -> None:
    assert load(file, silence(), group_by_length=typed).notices == ()


def test_default_values_of_names_without_effect_are_silent(file: Path) -> None:
    inert = silence(dataloader_num_workers=0, deepspeed=None, remove_unused_columns=True)
    assert load(file, inert).notices == ()
    assert load(file, silence(), remove_unused_columns="true", dataloader_num_workers="0").notices == ()


EVALUATED: dict[str, Any] = {"val_size": 5}
SWITCHED_OFF: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": "q_proj"}, {},
     "lora_r, lora_alpha, lora_dropout, lora_target_modules (full training has no adapters)"),
    ({"quantization_bit": 8}, {}, "quantization_bit (only QLoRA quantises the weights)"),
    ({"quantization_bit": 8}, {"use_lora": True, "lora_alpha": 32},
     "quantization_bit (only QLoRA quantises the weights)"),
    ({"val_seed": 1}, {"eval_data_path": "b.jsonl"}, "val_seed (val_size is 0)"),
    ({"eval_steps": 5, "per_device_eval_batch_size": 2}, {},
     "eval_steps, per_device_eval_batch_size (there is no evaluation data)"),
    ({"eval_steps": 5}, EVALUATED, 'eval_steps (eval_strategy is "epoch")'),
    ({"eval_steps": 5, "per_device_eval_batch_size": 2}, {**EVALUATED, "eval_strategy": "no"},
     'eval_steps, per_device_eval_batch_size (eval_strategy is "no")'),
    ({"save_steps": 5}, {"save_strategy": "epoch"}, 'save_steps (save_strategy is "epoch")'),
    ({"metric_for_best_model": "loss"}, EVALUATED, "metric_for_best_model (load_best_model_at_end is false)"),
    ({"num_train_epochs": 1}, {"max_steps": 9}, "num_train_epochs (max_steps is 9)"),
    ({"warmup_ratio": 0.1}, {"warmup_steps": 5}, "warmup_ratio (warmup_steps is 5)"),
    ({"warmup_ratio": 0.1}, {"lr_scheduler_type": "constant"}, "warmup_ratio (lr_scheduler_type is constant)"),
    ({"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-6}, {"optim": "sgd"},
     "adam_beta1, adam_beta2, adam_epsilon (optim is sgd)"),
]  # fmt: skip
SWITCHED_ON: dict[str, Any] = {
    "use_qlora": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "lora_target_modules": "q_proj",
    "quantization_bit": 8, "val_size": 5, "val_seed": 1, "eval_strategy": "steps", "eval_steps": 5,
    "per_device_eval_batch_size": 2, "save_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "num_train_epochs": 1, "warmup_ratio": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(("idle", "others", "told"), SWITCHED_OFF)
def test_settings_that_others_switch_off_are_named(
    file: Path, idle: dict[str, Any], others: dict[str, Any], told: str
) -> None:
    assert load(file, silence(**others)).notices == ()
    assert load(file, silence(**idle, **others)).notices == (f"No effect here: {told}.",)
    defaults = {name: TrainConfig.model_fields[name].default for name in idle}
    assert load(file, silence(**defaults, **others)).notices == ()


def test_settings_with_effect_are_not_named(file: Path) -> None:
    assert set().union(*(idle for idle, _, _ in SWITCHED_OFF)) <= set(SWITCHED_ON)
    assert load(file, silence(**SWITCHED_ON)).notices == ()


def test_one_notice_names_all(file: Path) -> None:
    (notice,) = load(file, silence(lora_r=8, fsdp="full_shard", eval_steps=5)).notices
    assert notice == (
        f"No effect here: fsdp ({NO_EFFECT['fsdp']}); eval_steps (there is no evaluation data); "
        "lora_r (full training has no adapters)."
    )


def test_the_settings_that_a_run_writes_down_say_nothing(file: Path) -> None:
    written = load(file, silence(**EVALUATED)).config.model_dump(mode="json")
    assert load(file, written).notices == ()


# --- resume_from_checkpoint: a switch and a path in one ---------------------------------------------------------------


@pytest.mark.parametrize(("typed", "value"), [("false", False), ("true", True), ("auto", "auto"), ("out/c", "out/c")])
def test_resume_flag_is_read_as_the_help_says(typed: str, value: object) -> None:
    assert load_train_config(None, DATA | {"resume_from_checkpoint": typed}).config.resume_from_checkpoint == value


def test_resume_null_means_the_default_as_everywhere(file: Path) -> None:
    assert load(file, silence(resume_from_checkpoint=None)) == load(file, silence())


# --- names that would change a result --------------------------------------------------------------------------------


def test_unsupported_names_pass_only_where_they_ask_for_nothing(file: Path) -> None:
    assert load(file, silence(push_to_hub=False, hub_model_id=None, label_smoothing_factor=0.0)).notices == ()
    with pytest.raises(UserError, match='"label_smoothing_factor" is not a setting'):
        load(file, silence(label_smoothing_factor=0.1))
