"""Full training of a multimodal checkpoint's text: the result is such a checkpoint, with all else as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from multimodal import KINDS, answered, apart, logits_of, made, opened, under_other_names
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, train

from qingtune.commands import train as train_command
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig
from qingtune.errors import UserError
from qingtune.files.weights_file import weight_files


def in_files(folder: Path, parts: int) -> None:
    """A model's tensors spread over several files, with names as on the hub, and others that no class knows."""
    tensors = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.randn(3, 5).to(torch.bfloat16)}
    (folder / "model.safetensors").unlink()
    files = [f"model.safetensors-{number:05}-of-{parts:05}.safetensors" for number in range(1, parts + 1)]
    places = {name: files[number % parts] for number, name in enumerate(sorted(tensors))}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "preprocessor_config.json").write_text("{}")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "other_names"),
    [
        *((kind, False) for kind in ("qwen3.5", "qwen3.5 moe", "gemma 3", "ministral", "qwen2.5-vl", "qwen3-vl")),
        ("gemma 3", True),
        ("llava", True),
    ],
)
def test_full_training_keeps_all_that_is_not_text(
    kind: str, other_names: bool, tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, result = tmp_path / "model", tmp_path / "result"
    made(kind, base, tied=kind != "qwen3-vl")
    if other_names:
        under_other_names(base)
    before = logits_of(opened(kind, base))
    in_files(base, 3)
    train(result, base, data_file, max_steps=2)
    assert f"takes all that is not text from {base}" in capsys.readouterr().err
    one, two = stored(base), stored(result)
    assert list(one) == list(two)
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}
    assert not any(part in name for name in changed for part in ("vis", "projector", "mtp"))
    assert any("layers.1." in name for name in changed)
    assert [path.name for path in weight_files(base)] == [path.name for path in weight_files(result)]
    assert (result / "preprocessor_config.json").exists()
    # Transformers opens it by its own class, as which the base's config.json names it.
    whole, found = transformers.AutoModelForImageTextToText.from_pretrained(result, output_loading_info=True)
    assert type(whole).__name__ == KINDS[kind][0]
    assert not found["missing_keys"]
    assert found["unexpected_keys"] <= {"mtp.fc.weight"}
    after = logits_of(whole.eval())
    assert apart(after, before) > 1e-3
    assert apart(answered(kind, result), after) < 1e-4


def test_a_result_of_full_training_is_a_base(tmp_path: Path, data_file: Path) -> None:
    base, result, adapter, merged = (tmp_path / name for name in ("model", "result", "adapter", "merged"))
    made("qwen3.5", base)
    train(result, base, data_file, max_steps=1)
    train(adapter, result, data_file, max_steps=2, learning_rate=0.05, **LORA)
    merge(MergeConfig(base_model=str(result), lora_model=str(adapter), output_dir=str(merged)))
    assert apart(answered("qwen3.5", merged), answered("qwen3.5", result, adapter)) < 1e-4
    assert apart(logits_of(opened("qwen3.5", merged)), answered("qwen3.5", merged)) < 1e-4


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_a_run_whose_base_is_gone_at_its_end_is_finished_when_that_is_back(
    saves: str, tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, away, result, wanted = (tmp_path / name for name in ("model", "away", "result", "wanted"))
    made("qwen3.5", base)
    settings = {"max_steps": 3, "save_strategy": saves, "save_steps": 1}
    train(wanted, base, data_file, **settings)
    loop: Any = train_command.run_loop

    def moves_it(*given: Any) -> bool:
        finished = loop(*given)
        base.rename(away)
        return finished

    with monkeypatch.context() as patched:
        patched.setattr(train_command, "run_loop", moves_it)
        with pytest.raises(UserError, match="kept in checkpoint-3") as error:
            train(result, base, data_file, **settings)
    assert str(base) in str(error.value)
    assert not (result / "config.json").exists()
    away.rename(base)
    assert train(result, base, data_file, **settings)
    one, two = stored(wanted), stored(result)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_an_adapter_is_written_though_its_base_is_gone(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, result = tmp_path / "model", tmp_path / "result"
    made("qwen3.5", base)
    loop: Any = train_command.run_loop

    def moves_it(*given: Any) -> bool:
        finished = loop(*given)
        base.rename(tmp_path / "away")
        return finished

    monkeypatch.setattr(train_command, "run_loop", moves_it)
    train(result, base, data_file, max_steps=1, **LORA)
    assert any("language_model" in name for name in load_file(result / "adapter_model.safetensors"))


def test_room_for_the_towers_is_looked_for_before_training(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "model"
    made("qwen3.5", base)
    tower = {"model.visual.large.weight": torch.zeros(50_000_000, dtype=torch.bfloat16)}
    save_file(load_file(base / "model.safetensors") | tower, base / "model.safetensors", metadata={"format": "pt"})
    usage = shutil.disk_usage(tmp_path)._replace(free=99_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"the result needs about 0\.1"):
        train(tmp_path / "result", base, data_file, max_steps=1)
