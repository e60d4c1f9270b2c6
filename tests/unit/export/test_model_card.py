"""A model card tells what is known, and nothing of this machine."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qingtune.config.load import load_train_config
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.export.gguf_file import Kept
from qingtune.export.model_card import ExportedFile, Origin, shown_name, write_card
from qingtune.runs.record import METRICS, Record, settings_to_compare

FILE = ExportedFile(
    "shop-q8_0.gguf", 531_000_000, "ab" * 32, {"Q8_0": Kept(17, 0.00621, "a"), "F32": Kept(4, 0.0, "b")}
)
SECRET = "hf_" + "a1B2c3D4e5" * 3


def record(results: dict[str, Any] | None = None, **settings: Any) -> Record:
    config = TrainConfig(data_path=["/srv/rows/train.jsonl"], **settings)
    return Record(
        method="lora",
        base_model="Qwen/Qwen2.5-0.5B-Instruct",
        base_fingerprint="0123",
        system_prompt=config.system_prompt,
        prompt_style="chat",
        stop_ids=[2],
        settings=settings_to_compare(config, 1, "4567", "0123"),
        results=results or {},
        versions={"qingtune": "0.1.0"},
    )


def card(tmp_path: Path, of: Record | None, base_model: str = "Qwen/Qwen2.5-0.5B-Instruct") -> str:
    write_card(
        tmp_path / "card.md", "shop", Origin(base_model, "0123", tmp_path, None, of), [FILE], ["a limit"], ["llama-cli"]
    )
    return (tmp_path / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_lora": "true"}, {"use_qlora": "true", "lora_r": "8"}, {"use_lora": "true", "val_size": "0.1"}],
    ids=["full", "lora", "qlora", "evaluated"],
)
def test_settings_that_nobody_touched_are_not_listed(tmp_path: Path, flags: dict[str, str]) -> None:
    config = load_train_config(None, {"data_path": "rows.jsonl", **flags}).config
    of = replace(record(), settings=settings_to_compare(config, 1, "4567", "0123"))
    listed = re.findall(r"(?m)^\| `(\w+)` \|", card(tmp_path, of))
    assert set(listed) == set(flags) - {"use_lora", "use_qlora"}
    config = load_train_config(None, {"data_path": "rows.jsonl", **flags, "learning_rate": "7e-5"}).config
    of = replace(record(), settings=settings_to_compare(config, 1, "4567", "0123"))
    assert "| `learning_rate` | `7e-05` |" in card(tmp_path, of)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"val_size": 0.1}, "10 % of the training rows, held out (seed 42)"),
        ({"val_size": 0.125, "val_seed": 7}, "12.5 % of the training rows, held out (seed 7)"),
        ({"val_size": 50}, "50 of the training rows, held out (seed 42)"),
        ({"eval_data_path": ["/srv/held.jsonl"]}, "`held.jsonl`"),
        ({}, "none named"),
    ],
)
def test_evaluation_data_is_named(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    assert f"| evaluation data | {told} |" in card(tmp_path, record(**settings))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("gpt2", "gpt2"),
        ("/srv/models/Qwen2.5/", "Qwen2.5"),
        ("./Qwen2.5", "Qwen2.5"),
        ("~/Qwen2.5", "Qwen2.5"),
        ("a/b/Qwen2.5.gguf", "Qwen2.5.gguf"),
        ("here/Qwen2.5", "Qwen2.5"),
        (r"C:\models\Qwen2.5", "Qwen2.5"),
    ],
)
def test_names_lose_the_folders_of_this_machine(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shown_name(name) == shown


def test_the_front_matter_is_what_hubs_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: other\n", encoding="utf-8")
    assert card(tmp_path, record()).splitlines()[:9] == [
        "---", "base_model: Qwen/Qwen2.5-0.5B-Instruct", "library_name: gguf", "license: apache-2.0",
        "pipeline_tag: text-generation", "tags:", "- gguf", "- qingtune", "- lora",
    ]  # fmt: skip


def test_measured_results_are_told_and_others_named_as_such(tmp_path: Path) -> None:
    results = {"steps": 1200, "seconds": 61.4, "peak_bytes": 2.26e9, "eval_loss_before": 2.5, "eval_loss": 1.25}
    text = card(tmp_path, record(results))
    for row in (
        "| evaluation loss | before 2.5000, after 1.2500 |", "| optimizer steps | 1,200 |", "| duration | 61 s |",
        "| peak memory | 2.26 GB |", "| training loss | not measured |", "- a limit", "| data | `train.jsonl` |",
        "| `shop-q8_0.gguf` | 531 MB | Q8_0 0.621% (17), F32 0.000% (4) |",
    ):  # fmt: skip
        assert row in text, row
    assert "| evaluation loss | not measured |" in card(tmp_path, record())
    assert "no record of qingtune's" in card(tmp_path, None)


def test_settings_are_shown_where_they_are_not_the_defaults(tmp_path: Path) -> None:
    text = card(tmp_path, record(lora_r=64, lora_target_modules=["q_proj", "v_proj"], warmup_ratio=0.0))
    assert "| `lora_r` | `64` |" in text
    assert '| `lora_target_modules` | `["q_proj", "v_proj"]` |' in text
    assert "warmup_ratio" not in text


def test_no_secret_and_no_path_gets_in(tmp_path: Path) -> None:
    text = card(tmp_path, record(system_prompt=f"key {SECRET} | `x`\nline", model_name_or_path="/srv/models/q"))
    assert SECRET not in text
    assert "/srv" not in text
    assert r"| system prompt | `` key *** \| `x`<br>line `` |" in text


HOSTILE = [
    "x\nlicense: evil",
    "x\r# Heading",
    "evil/model\n---\n# Heading",
    "[click](http://evil) ![](http://evil/x.png) http://evil www.evil.com",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "` <b>x</b> `` | a \\| <i>b</i>",
    "a\u2028# Heading\n\n- item\n> quote",
    "*bold* _x_ ~~y~~ $z$ &lt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_stays_text(text: str, tmp_path: Path) -> None:
    """Every line begins as the card's own do, and outside of code nothing of the text is markup."""
    of = replace(
        record(system_prompt=text, lora_r=64),
        method=text,
        base_fingerprint=text,
        settings={"data_path": [text], "data": text, "optim": text, "samples a step": text},
        versions={text: text},
    )
    (tmp_path / "README.md").write_text(f"---\nlicense: {text}\n---\n", encoding="utf-8")
    write_card(tmp_path / "card.md", "shop", Origin(text, text, tmp_path, None, of), [FILE], [text], ["llama-cli"])
    written = (tmp_path / "card.md").read_text(encoding="utf-8")
    head, body = written.removeprefix("---\n").split("\n---\n", 1)
    licence = re.compile(r"license: \w[\w.-]*")  # a word of the base's own card
    assert [line for line in head.splitlines() if not licence.fullmatch(line)] == [
        "library_name: gguf",
        "pipeline_tag: text-generation",
        "tags:",
        "- gguf",
        "- qingtune",
    ]
    begins = {"# shop", "## Tr", "## Fi", "## Us", "## Wh", "| ", "```", "- ", "Setti", "Each ", "llama", "ollam"}
    lines = [line for line in body.splitlines() if line]
    assert all(any(line.startswith(begin) for begin in begins) or line == lines[1] for line in lines)
    outside = re.sub(r"(?<!`)(`+)(?!`)(?s:.+?)(?<!`)\1(?!`)", "", re.sub(r"```[^`]*```", "", body))
    for line in outside.splitlines():
        if not line.startswith(("#", "| ---")):
            assert not re.search(r"(?<!\\)[*\[\]<>~$&]|(?<![\w\\])_|(?<!\\)_(?!\w)|https?://|www\.", line), line
    for row in (line for line in lines if line.startswith("| ")):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 5), row


@pytest.mark.parametrize("name", ["", "a\0b/c", "x" * 5000 + "/y", "\n/"])
def test_names_that_are_no_paths_are_shown(name: str) -> None:
    assert isinstance(shown_name(name), str)


@pytest.mark.parametrize("line", ["5", '{"step": 1, "trained_tokens": 1, "loss": "x"}', "[" * 10_000 + "}"])
def test_a_log_that_is_broken_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS).write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{METRICS}:1"):
        card(tmp_path, record())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_the_place_of_the_bases_card_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(UserError, match="not a regular file"):
        card(tmp_path, None)
