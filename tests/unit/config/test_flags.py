"""Command lines -> settings as text; and --help, which is made from the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qingtune.config.commands import CompareConfig, ExportConfig, InferConfig, MergeConfig, PushConfig
from qingtune.config.flags import default_of, extra_of, parse_flags
from qingtune.config.load import load_train_config
from qingtune.config.training import Settings, TrainConfig
from qingtune.errors import UserError

SCHEMAS: list[type[Settings]] = [TrainConfig, InferConfig, MergeConfig, ExportConfig, PushConfig, CompareConfig]


def parsed(*argv: str, schema: type[Settings] = TrainConfig) -> dict[str, str]:
    return parse_flags(schema, "qingtune train", "Train.", argv, config_file=True)[1]


@pytest.mark.parametrize(
    "argv",
    [
        ("--lora_r", "4", "--use_lora", "true"),
        ("--lora-r", "4", "--use-lora", "true"),
        ("--lora_r=4", "--use_lora=true"),
        ("--lora-r=4", "--use-lora"),
        ("--use_lora", "--lora_r", "4"),
        ("--lora_r", "8", "--use_lora", "--lora_r", "4"),
    ],
    ids=" ".join,
)
def test_all_ways_to_write_a_flag_mean_the_same(argv: tuple[str, ...]) -> None:
    assert parsed(*argv) == {"lora_r": "4", "use_lora": "true"}


@pytest.mark.parametrize("name", [name for name, field in TrainConfig.model_fields.items() if field.annotation is bool])
def test_bare_switch_means_true_and_takes_a_value(name: str) -> None:
    assert parsed(f"--{name}") == {name: "true"}
    assert parsed(f"--{name}", "false") == {name: "false"}


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_setting_is_a_flag_in_both_spellings(name: str) -> None:
    assert parsed(f"--{name}", "1") == parsed(f"--{name.replace('_', '-')}", "1") == {name: "1"}


@pytest.mark.parametrize("option", [["--config_file", "a-b.json"], ["--config-file=a-b.json"]])
def test_config_file_is_told_apart_from_settings(option: list[str]) -> None:
    assert parse_flags(TrainConfig, "x", "", [*option, "--seed", "1"], config_file=True) == ("a-b.json", {"seed": "1"})


@pytest.mark.parametrize(
    "value",
    [
        "my-file.jsonl",
        "a=b",
        "-1",
        "",
        "--- front-matter of a-page",
        "- one\n- two-thirds",
        "你好 - 再见",
    ],
)
def test_values_are_left_as_they_are(value: str) -> None:
    assert parsed("--prompt", value, schema=InferConfig) == {"prompt": value}
    assert parsed(f"--prompt={value}", schema=InferConfig) == {"prompt": value}


def test_negative_numbers_are_values() -> None:
    assert parsed("--max_steps", "-1") == {"max_steps": "-1"}


def test_flags_of_several_words_end_at_the_next_flag() -> None:
    argv = ("--grid", "lora_r=8,16", "lora_alpha=16", "--seeds", "2", "--grid", "max_steps=-1")
    assert parsed(*argv, schema=CompareConfig) == {"grid": "lora_r=8,16 lora_alpha=16 max_steps=-1", "seeds": "2"}


@pytest.mark.parametrize("argv", [("stray",), ("--lora_r", "4", "stray"), ("--zzz", "1", "stray"), ("-r", "4")])
def test_stray_words_are_named(argv: tuple[str, ...]) -> None:
    word = "-r" if "-r" in argv else "stray"
    with pytest.raises(UserError, match=f'command line: "{word}" is not a flag') as caught:
        parsed(*argv)
    assert "--name value" in str(caught.value)


def test_abbreviations_are_not_guessed() -> None:
    assert parsed("--lora", "4") == {"lora": "4"}


def test_unknown_flags_are_reported_with_everything_else(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lora_dropuot": 0.1, "lora_r": 0}), encoding="utf-8")
    argv = ["--config_file", str(file), "--lora-rnak", "8", "--zzz", "--seed", "x"]
    config_file, flags = parse_flags(TrainConfig, "qingtune train", "", argv, config_file=True)
    with pytest.raises(UserError) as caught:
        load_train_config(config_file, flags)
    lines = str(caught.value).splitlines()
    wanted = [
        f'{file}: "lora_dropuot" is not a setting. Did you mean "lora_dropout"?',
        f'{file}: "lora_r" is 0: ',
        '--lora_rnak: "lora_rnak" is not a setting. Did you mean "lora_r"?',
        '--zzz: "zzz" is not a setting',
        '--seed: "seed" is "x": ',
        "data_path is missing",
    ]
    assert len(lines) == len(wanted)
    for start in wanted:
        assert any(start in line for line in lines), start


# --- Help ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def show(schema: type[Settings], option: str = "--help") -> str:
        with pytest.raises(SystemExit) as stopped:
            parse_flags(
                schema, "qingtune train", "What it does.", [option], config_file=issubclass(schema, TrainConfig)
            )
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_lists_every_setting_with_its_sentence_and_default(
    help_of: Callable[..., str], schema: type[Settings]
) -> None:
    shown = help_of(schema)
    flowing = re.sub(r"\s+", "", shown)  # wrapped lines break at hyphens too
    for name, field in schema.model_fields.items():
        assert re.search(rf"^ +--{name}\b", shown, re.MULTILINE), name
        heading = re.escape(extra_of(field, "group"))
        assert re.search(rf"^{heading}:$", shown, re.MULTILINE), name
        for part in (field.description or "", default_of(field)):
            assert re.sub(r"\s+", "", part) in flowing, name
    assert ("--config_file" in shown) == issubclass(schema, TrainConfig)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_fits_80_columns(help_of: Callable[..., str], schema: type[Settings]) -> None:
    assert [line for line in help_of(schema).splitlines() if len(line) > 80] == []


def test_short_help_option(help_of: Callable[..., str]) -> None:
    assert help_of(TrainConfig, "-h") == help_of(TrainConfig)


@pytest.mark.parametrize(
    ("name", "choices"),
    [("hub", ["auto", "hf", "modelscope"]), ("optim", ["adamw_torch", "sgd"]), ("quantization_bit", ["4", "8"])],
)
def test_help_names_the_choices(help_of: Callable[..., str], name: str, choices: list[str]) -> None:
    entry = help_of(TrainConfig).partition(f"--{name} ")[2].partition("\n  --")[0]
    for choice in choices:
        assert re.search(rf"\b{choice}\b", entry)
