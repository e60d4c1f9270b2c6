"""The schema itself: shipped configurations, what defaults resolve to, and the generated JSON Schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_tool
from pydantic import ValidationError

from qingtune.config.commands import CompareConfig, ExportConfig, InferConfig, MergeConfig, PushConfig
from qingtune.config.flags import extra_of
from qingtune.config.load import load_train_config
from qingtune.config.no_effect import NO_EFFECT
from qingtune.config.training import ALIASES, Settings, TrainConfig
from qingtune.errors import UserError

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
DATA = {"data_path": "train.jsonl"}


def resolved(**flags: str) -> TrainConfig:
    return load_train_config(None, DATA | flags).config


def notices(**flags: str) -> tuple[str, ...]:
    return load_train_config(None, DATA | flags).notices


# --- Shipped configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads_and_speaks_for_itself(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert f"python fine_tune_qwen.py --config_file configs/{path.name}" in content["_how"]
    assert content["_memory"].strip()
    loaded = load_train_config(str(path), {})
    assert [notice for notice in loaded.notices if "no effect" in notice.lower()] == []
    for data_file in [*(loaded.config.data_path or []), *(loaded.config.eval_data_path or [])]:
        assert (ROOT / data_file).is_file(), data_file


@pytest.mark.parametrize(
    ("name", "method", "bits", "rate"),
    [
        ("train_config_full", "full", 4, 2e-5),
        ("train_config_lora", "lora", 4, 1e-4),
        ("train_config_qlora", "qlora", 4, 2e-4),
        ("train_config_qlora_8bit", "qlora", 8, 2e-4),
    ],
)
def test_guide_config_is_what_the_guide_says(name: str, method: str, bits: int, rate: float) -> None:
    config = load_train_config(str(ROOT / "configs" / f"{name}.json"), {}).config
    assert (config.method, config.quantization_bit, config.learning_rate) == (method, bits, rate)
    if method != "full":
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)


def test_shipped_configs_write_to_different_folders() -> None:
    folders = [json.loads(path.read_text(encoding="utf-8"))["output_dir"] for path in CONFIGS]
    assert len(set(folders)) == len(folders)


# --- What defaults resolve to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "method", "rate"),
    [
        ({}, "full", 2e-5),
        ({"use_lora": "true"}, "lora", 2e-4),
        ({"use_qlora": "true"}, "qlora", 2e-4),
        ({"use_qlora": "true", "quantization_bit": "8"}, "qlora", 2e-4),
        ({"use_lora": "true", "use_qlora": "true"}, "qlora", 2e-4),
    ],
)
def test_learning_rate_follows_the_method(flags: dict[str, str], method: str, rate: float) -> None:
    config = resolved(**flags)
    assert (config.method, config.learning_rate) == (method, rate)
    assert any(f"{rate:g}" in notice and method in notice for notice in notices(**flags))


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_alpha_is_twice_the_rank_unless_given(rank: int) -> None:
    assert resolved(use_lora="true", lora_r=str(rank)).lora_alpha == 2 * rank
    assert resolved(use_lora="true", lora_r=str(rank), lora_alpha="7").lora_alpha == 7


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        ({}, "no"),
        ({"eval_data_path": "eval.jsonl"}, "epoch"),
        ({"val_size": "0.1"}, "epoch"),
        ({"val_size": "5", "eval_strategy": "steps"}, "steps"),
        ({"val_size": "5", "eval_strategy": "no"}, "no"),
    ],
)
def test_evaluation_happens_each_epoch_if_there_is_data_for_it(flags: dict[str, str], strategy: str) -> None:
    assert resolved(**flags).eval_strategy == strategy


def test_eval_steps_follow_logging_steps_unless_given() -> None:
    assert resolved(logging_steps="7").eval_steps == 7
    assert resolved(logging_steps="7", eval_steps="3").eval_steps == 3


def test_given_values_are_neither_changed_nor_told() -> None:
    config = resolved(use_lora="true", learning_rate="0.005", lora_alpha="9")
    assert (config.learning_rate, config.lora_alpha) == (0.005, 9)
    assert notices(use_lora="true", learning_rate="0.005", lora_alpha="9") == ()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"use_lora": "true", "learning_rate": "0.05"}, True),
        ({"use_lora": "true", "learning_rate": "1e-3"}, False),  # the guide's highest, for QLoRA
        ({"use_lora": "true", "learning_rate": "1e-3", "loraplus_lr_ratio": "16"}, True),
        ({"learning_rate": "0.005"}, True),
        ({"learning_rate": "1e-4"}, False),
        ({"learning_rate": "20", "optim": "sgd"}, False),
    ],
)
def test_a_learning_rate_at_which_runs_learn_nothing_is_told(flags: dict[str, str], told: bool) -> None:
    resolved(**flags)
    assert any("so high that the model may not learn" in notice for notice in notices(**flags)) is told


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, field in TrainConfig.model_fields.items()
        if field.default is None and name not in ("data_path", "learning_rate")
    ],
)
def test_null_as_a_flag_is_no_value(name: str) -> None:
    assert resolved(**{name: "null"}) == resolved()


def test_null_is_no_value_of_a_setting_that_needs_one() -> None:
    with pytest.raises(UserError, match=r'--lora_r: "lora_r" is "null"'):
        resolved(lora_r="null")


def test_both_methods_at_once_are_told_to_be_qlora() -> None:
    assert any("training with QLoRA" in notice for notice in notices(use_lora="true", use_qlora="true"))


@pytest.mark.parametrize(
    ("typed", "layers"),
    [("all", None), ("", None), ("q_proj", ["q_proj"]), ("q_proj, v_proj,", ["q_proj", "v_proj"])],
)
def test_target_modules_from_text(typed: str, layers: list[str] | None) -> None:
    assert resolved(use_lora="true", lora_target_modules=typed).lora_target_modules == layers


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("layers_to_transform", "0-3, 7", [0, 1, 2, 3, 7]),
        ("layers_to_transform", "5", [5]),
        ("layers_to_transform", "", None),
        ("rank_pattern", "q_proj=8, layers.0.mlp.up_proj=16", {"q_proj": 8, "layers.0.mlp.up_proj": 16}),
        ("rank_pattern", '{"layers\\\\.[0-3]\\\\..*": 4}', {"layers\\.[0-3]\\..*": 4}),
        ("rank_pattern", "", None),
        ("alpha_pattern", "q_proj=8.5", {"q_proj": 8.5}),
        ("modules_to_save", "lm_head,norm", ["lm_head", "norm"]),
        ("init_lora_weights", "true", "default"),
        ("init_lora_weights", "pissa_niter_16", "pissa_niter_16"),
    ],
)
def test_kinds_of_adapters_from_text(name: str, typed: str, value: object) -> None:
    assert getattr(resolved(use_lora="true", **{name: typed}), name) == value


def test_json_has_the_same_forms(tmp_path: Path) -> None:
    content = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q": 1.5}, "layers_to_transform": 3}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DATA | {"use_lora": True, "init_lora_weights": True} | content))
    config = load_train_config(str(file), {}).config
    assert (config.rank_pattern, config.alpha_pattern, config.layers_to_transform) == ({"q_proj": 8}, {"q": 1.5}, [3])
    assert config.init_lora_weights == "default"


def test_alpha_left_out_is_told_with_what_it_scales() -> None:
    assert "lora_alpha = 32, twice lora_r, so the adapter scale is 2 at any rank." in notices(use_lora="true")
    weak = notices(use_lora="true", lora_r="64", lora_alpha="16")
    start = "lora_alpha 16 at lora_r 64 gives an adapter scale of 0.25, with which adapters learn slowly"
    assert any(line.startswith(start) and "Leave lora_alpha out (default 128)" in line for line in weak)
    for fine in ({"lora_alpha": "32"}, {"lora_alpha": "16", "use_rslora": "true"}):
        assert not any("slowly" in line for line in notices(use_lora="true", lora_r="64", **fine))
    (told,) = (line for line in notices(use_lora="true", use_rslora="true") if "lora_alpha" in line)
    assert told.endswith("with use_rslora the adapter scale is lora_alpha / sqrt(lora_r) = 8.")


@pytest.mark.parametrize(("typed", "trackers"), [("none", None), ("None", None), ("wandb,mlflow", ["wandb", "mlflow"])])
def test_trackers_from_text(typed: str, trackers: list[str] | None) -> None:
    assert resolved(report_to=typed).report_to == trackers


def test_settings_cannot_change_once_checked() -> None:
    config = resolved()
    with pytest.raises(ValidationError):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


# --- The schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [TrainConfig, InferConfig, MergeConfig, ExportConfig, PushConfig, CompareConfig])
def test_every_setting_has_a_heading_and_a_sentence(schema: type[Settings]) -> None:
    for name, field in schema.model_fields.items():
        assert extra_of(field, "group"), name
        assert re.search(r"[.)]$", field.description or ""), name


def test_names_without_effect_and_older_names_do_not_overlap_with_others() -> None:
    heading = {name for name, field in TrainConfig.model_fields.items() if extra_of(field, "group") == "No effect here"}
    assert heading == set(NO_EFFECT) & set(TrainConfig.model_fields)
    assert set(ALIASES) & (set(TrainConfig.model_fields) | set(NO_EFFECT)) == set()
    assert set(ALIASES.values()) <= set(TrainConfig.model_fields)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(load_tool("generate_docs").json_schema())


def fits(value: object, rule: dict[str, Any]) -> bool:
    """The part of JSON Schema that the generated one uses, as its library is no dependency."""
    if "anyOf" in rule:
        return any(fits(value, choice) for choice in rule["anyOf"])
    if "enum" in rule:
        return value in rule["enum"]
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
        "null": (type(None),),
    }
    kind = rule.get("type")
    if kind is None:
        return True
    if isinstance(value, bool) and kind != "boolean":
        return False
    if not isinstance(value, kinds[kind]):
        return False
    if isinstance(value, (int, float)):
        return (
            value >= rule.get("minimum", value)
            and value > rule.get("exclusiveMinimum", value - 1)
            and value <= rule.get("maximum", value)
            and value < rule.get("exclusiveMaximum", value + 1)
        )
    return all(fits(item, rule.get("items", {})) for item in value) if isinstance(value, list) else True


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_json_schema_accepts_shipped_configs(schema: dict[str, Any], path: Path) -> None:
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        if not any(re.search(pattern, name) for pattern in schema["patternProperties"]):
            assert fits(value, schema["properties"][name]), name


def test_json_schema_knows_every_accepted_name_and_no_other(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == {*TrainConfig.model_fields, *ALIASES, *NO_EFFECT}
    assert schema["additionalProperties"] is False
    for older, newer in ALIASES.items():
        assert schema["properties"][older] == schema["properties"][newer]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", 0),
        ("lora_r", True),
        ("quantization_bit", 3),
        ("optim", "adam"),
        ("use_lora", "yes please"),
        ("data_path", 5),
    ],
)
def test_json_schema_refuses_what_loading_refuses(schema: dict[str, Any], name: str, value: object) -> None:
    assert not fits(value, schema["properties"][name])


def test_json_schema_lets_text_and_list_stand_for_data(schema: dict[str, Any]) -> None:
    for value in ("a.jsonl", "a.jsonl,b.csv", ["a.jsonl", "b.csv"], None):
        assert fits(value, schema["properties"]["data_path"])
