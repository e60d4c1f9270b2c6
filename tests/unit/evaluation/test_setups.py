"""Methods and varied settings -> setups: what each is trained with, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qingtune.config.commands import CompareConfig
from qingtune.config.load import Loaded, load_config
from qingtune.config.types import Interval
from qingtune.errors import UserError
from qingtune.evaluation.compare.setups import (
    Setup,
    about_full_training,
    about_learning_rates,
    check_varied,
    grid_setups,
)

DATA = {"data_path": "train.jsonl", "eval_data_path": "eval.jsonl"}


def load(**flags: str) -> Loaded[CompareConfig]:
    return load_config(CompareConfig, None, DATA | flags)


def setups(**flags: str) -> dict[str, Setup]:
    loaded = load(**flags)
    check_varied(loaded.config)
    return {setup.name: setup for setup in grid_setups(loaded)}


def rates(**flags: str) -> dict[str, float | None]:
    return {name: setup.config.learning_rate for name, setup in setups(**flags).items()}


# --- Methods ---------------------------------------------------------------------------------------------------------


def test_all_four_methods_by_default() -> None:
    found = setups(use_lora="true", lora_r="8")
    assert [*found] == ["full", "lora", "qlora4", "qlora8"]
    assert [setup.config.method for setup in found.values()] == ["full", "lora", "qlora", "qlora"]
    assert [found[name].config.quantization_bit for name in ("qlora4", "qlora8")] == [4, 8]
    assert [setup.config.lora_r for setup in found.values()] == [16, 8, 8, 8]  # full: the default, as left out


def test_a_learning_rate_stays_with_its_method() -> None:
    assert rates(use_lora="true", learning_rate="3e-4") == {"full": 2e-5, "lora": 3e-4, "qlora4": 2e-4, "qlora8": 2e-4}
    assert rates(use_qlora="true", learning_rate="3e-4") == {"full": 2e-5, "lora": 2e-4, "qlora4": 3e-4, "qlora8": 3e-4}
    assert rates(learning_rate="3e-5", methods="full,lora") == {"full": 3e-5, "lora": 2e-4}


def test_the_user_is_told_whose_a_learning_rate_is() -> None:
    def told(**flags: str) -> str | None:
        loaded = load(**flags)
        return about_learning_rates(loaded.config, loaded.given)

    line = told(use_lora="true", learning_rate="3e-4", per_method="full.learning_rate=2e-5")
    assert line is not None
    assert line.startswith("learning_rate 0.0003 is that of lora training; qlora4, qlora8 train at ")
    assert told(use_lora="true") is None
    assert told(use_lora="true", learning_rate="3e-4", methods="lora") is None
    assert told(use_lora="true", learning_rate="3e-4", grid="learning_rate=1e-4,2e-4") is None


def test_settings_of_a_method_are_its_alone() -> None:
    found = setups(methods="full,lora", per_method="full.learning_rate=7e-5 lora.lora_r=4 lora.lora_alpha=4")
    assert (found["full"].config.learning_rate, found["lora"].config.learning_rate) == (7e-5, 2e-4)
    assert (found["lora"].config.lora_r, found["lora"].config.lora_alpha) == (4, 4)


def test_adapters_settings_are_no_fault_in_full_training() -> None:
    flags = {"use_lora": "true", "use_dora": "true", "lora_dropout": "0.1", "modules_to_save": "lm_head"}
    config = setups(**flags, methods="full")["full"].config
    assert (config.method, config.use_dora, config.lora_dropout, config.modules_to_save) == ("full", False, 0.0, None)


def test_what_a_method_cannot_do_is_told_with_its_name() -> None:
    with pytest.raises(UserError, match=r"^qlora4: init_lora_weights pissa subtracts"):
        setups(use_lora="true", init_lora_weights="pissa", methods="lora,qlora4")


# --- Grids -----------------------------------------------------------------------------------------------------------


def test_grid_varies_the_settings_own_method() -> None:
    found = setups(use_lora="true", grid="lora_r=8,16 learning_rate=1e-4,2e-4")
    assert [(setup.config.lora_r, setup.config.learning_rate) for setup in found.values()] == [
        (8, 1e-4), (8, 2e-4), (16, 1e-4), (16, 2e-4),
    ]  # fmt: skip
    assert [*found][1] == "lora lora_r=8 learning_rate=0.0002"
    assert {setup.config.lora_alpha for setup in found.values()} == {16, 32}  # twice each rank


def test_grid_with_methods_has_full_training_once() -> None:
    assert [*setups(methods="full,lora", grid="lora_r=8,16")] == ["full", "lora lora_r=8", "lora lora_r=16"]


def test_what_full_training_does_not_have_is_told() -> None:
    told = about_full_training(load(methods="full,lora", grid="lora_r=8,16 learning_rate=1e-4").config)
    assert told == "lora_r: no effect on full training, which is not repeated for it."
    assert about_full_training(load(methods="lora", grid="lora_r=8,16").config) is None
    assert about_full_training(load(methods="full", grid="learning_rate=1e-4,2e-4").config) is None


def test_default_leaves_a_setting_out() -> None:
    found = setups(use_lora="true", lora_r="64", lora_alpha="8", grid="lora_alpha=16,default")
    assert [setup.config.lora_alpha for setup in found.values()] == [16, 128]


def test_the_same_however_it_is_written() -> None:
    assert setups(use_lora="true", grid="learning_rate=1e-4").keys() == {"lora learning_rate=0.0001"}
    assert setups(use_lora="true", grid="learning-rate=0.00010").keys() == {"lora learning_rate=0.0001"}


def test_values_with_commas() -> None:
    found = setups(use_lora="true", grid="lora_target_modules=q_proj,v_proj;all")
    assert [setup.config.lora_target_modules for setup in found.values()] == [["q_proj", "v_proj"], None]


def test_names_make_paths_and_differ() -> None:
    found = setups(use_lora="true", grid="lora_target_modules=.*q_proj;./q_proj;q_proj lora_r=8")
    slugs = [setup.slug for setup in found.values()]
    assert len({*slugs}) == 3
    assert not [slug for slug in slugs if "/" in slug or "*" in slug or " " in slug]
    assert slugs[2] == "lora_lora_target_modules=q_proj_lora_r=8"


def test_long_names_make_paths_too(tmp_path: Path) -> None:
    names = "目标模块" * 30
    found = setups(use_lora="true", grid=f"lora_target_modules={names};{names}A;q_proj")
    folders = {tmp_path / f"{setup.slug}-seed42.json" for setup in found.values()}
    for folder in folders:
        folder.touch()
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"grid": "lora_rr=8"}, 'grid: "lora_rr" is not a setting. Did you mean "lora_r"?'),
        ({"grid": "lora_r=0"}, 'lora lora_r=0: "lora_r" is "0"'),
        ({"grid": "data_path=a.jsonl"}, '"data_path" cannot differ between the trials'),
        ({"grid": "seed=1,2"}, '"seed" cannot differ between the trials'),
        ({"grid": "use_lora=true,false"}, '"use_lora" cannot differ'),
        ({"per_method": "lora.eval_strategy=no"}, '"eval_strategy" cannot differ'),
        ({"grid": "seeds=1,2"}, '"seeds" cannot differ'),
        ({"per_method": "lora.max_seq_length=8"}, '"max_seq_length" cannot differ'),
        ({"per_method": "full.learning_rate=1"}, "per_method sets full, which is not compared"),
        ({"per_method": "lora.lora_r=4", "grid": "lora_r=8,16"}, '"lora_r" is in grid and in per_method'),
        ({"grid": "lora_r=8", "space": "lora_alpha=8,16"}, "grid and space are both given"),
        ({"grid": "num_train_epochs=1,2", "max_steps": "6"}, "num_train_epochs has no effect, because max_steps is 6"),
    ],
    ids=str,
)
def test_what_cannot_be_varied_is_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        setups(use_lora="true", methods="lora", **flags)
    assert message in str(caught.value)


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("grid", "lora_r=8,16", {"lora_r": ["8", "16"]}),
        ("grid", {"lora_r": [8, 16], "lora_alpha": 16}, {"lora_r": [8, 16], "lora_alpha": [16]}),
        ("space", "lora_r=8..64", {"lora_r": Interval(low=8, high=64, whole=True)}),
        ("space", {"learning_rate": "1e-5..1e-3:log"}, {"learning_rate": Interval(low=1e-5, high=1e-3, log=True)}),
        (
            "space",
            "lora_dropout=0..0.1 lora_r=8,16",
            {"lora_dropout": Interval(low=0, high=0.1), "lora_r": ["8", "16"]},
        ),
        ("per_method", "full.lora-r=1", {"full": {"lora_r": "1"}}),
        ("methods", "full,qlora8", ["full", "qlora8"]),
    ],
    ids=str,
)
def test_values_are_understood(name: str, text: Any, value: Any) -> None:
    assert getattr(CompareConfig.model_validate({name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("grid", "lora_r", "lora_r is not NAME=VALUE"),
        ("grid", "lora_r=8 lora_r=16", "lora_r is given twice"),
        ("grid", "lora_r=8,8", "8 is given twice"),
        ("grid", "lora_r=,", "lora_r has no value"),
        ("space", "lora_r=,", "lora_r has no value"),
        ("space", "lora_r=64..8", "64..8 ends before it begins"),
        ("space", "lora_r=0..8:log", "above 0"),
        ("space", "lora_r=a..b", "a..b is not LOW..HIGH"),
        ("per_method", "lora_r=8", "lora_r is not METHOD.SETTING"),
        ("per_method", "lorra.lora_r=8", "'full', 'lora', 'qlora4' or 'qlora8'"),
        ("methods", "full,dora", "'full', 'lora', 'qlora4' or 'qlora8'"),
    ],
    ids=str,
)
def test_wrong_values_are_told(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(**{name: text})
    assert f'--{name}: "{name}" is' in str(caught.value)
    assert message in str(caught.value)
