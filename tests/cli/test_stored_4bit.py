"""Every command on a model that is stored in 4 bits: it works on what the codes stand for, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, make_model, make_tokenizer, write_jsonl
from test_train_to_merge import call

from qingtune.answering.decoder.packed import has_int4_kernels

Work = tuple[Path, Path]
SHORT = ("--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--learning_rate", "0.01")
GREEDY = ("--temperature", "0", "--max_new_tokens", "8", "--prompt", "写一条笔记。")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A folder, and in it a model merged into 4 bits by the command."""
    folder = tmp_path_factory.mktemp("work")
    make_model("qwen2").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    data = write_jsonl(folder / "t.jsonl", instruction_rows(12))
    paths = ("--model_name_or_path", folder / "base", "--data_path", data, "--output_dir", folder / "adapter")
    code, _, err = call("train", *paths, "--use_lora", "--lora_r", "4", *SHORT)
    assert code == 0, err
    argv = ("merge", "--lora_model", folder / "adapter", "--output_dir", folder / "stored", "--save_in_4bit")
    code, out, err = call(*argv)
    assert code == 0, err
    assert out.startswith("Merged model: ")
    assert "Lost by 4 bits, against base + adapter" in err
    return folder, folder / "stored"


@pytest.mark.parametrize("flags", [(), ("--load_in_8bit",), ("--load_in_4bit",)])
def test_it_answers(flags: tuple[str, ...], work: Work) -> None:
    code, out, err = call("infer", "--base_model", work[1], *GREEDY, *flags)
    assert code == 0, err
    assert out.endswith("\n")
    assert "stored in 4 bits (NF4)" in err
    assert "tok/s" in err
    packed = flags == ("--load_in_4bit",) and has_int4_kernels() and not torch.cuda.is_available()
    assert ("again into the format" in err) == packed


def test_it_chats(work: Work) -> None:
    code, out, err = call("chat", "--base_model", work[1], *GREEDY[:4], stdin="Hello\n/exit\n")
    assert code == 0, err
    assert out.endswith("\n")


@pytest.mark.parametrize("method", [["use_lora"], ["use_qlora"], ["use_qlora", "quantization_bit 8"]])
def test_adapters_train_on_it_and_answer_with_it(method: list[str], work: Work, tmp_path: Path) -> None:
    folder, stored = work
    flags = [word for setting in method for word in f"--{setting}".split()]
    paths = ("--model_name_or_path", stored, "--data_path", folder / "t.jsonl", "--output_dir", tmp_path / "out")
    code, _, err = call("train", *paths, *flags, *SHORT)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("loss", 0) > 0 for line in lines)
    code, _, err = call("infer", "--lora_model", tmp_path / "out", *GREEDY)
    assert code == 0, err
    assert "tok/s" in err
    code, out, err = call("merge", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert "the base is stored in 4 bits" in err
    assert "--base_model NAME --allow_other_base" in err
    again = ("--base_model", folder / "base", "--allow_other_base")
    code, out, err = call("merge", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged", *again)
    assert code == 0, err


def test_full_training_is_refused(work: Work, tmp_path: Path) -> None:
    folder, stored = work
    paths = ("--model_name_or_path", stored, "--data_path", folder / "t.jsonl", "--output_dir", tmp_path / "out")
    code, out, err = call("train", *paths, "--max_steps", "2")
    assert (code, out) == (2, "")
    assert "stored in 4 bits. Pass the model in 16 bits, or pass --use_qlora." in err
    assert not (tmp_path / "out").exists()


def test_it_is_exported_as_what_it_stands_for(work: Work, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from qingtune.models.stored_weights import StoredWeights

    code, _, err = call("export", "--base_model", work[1], "--output_dir", tmp_path / "out", "--quantize", "f32")
    assert code == 0, err
    assert "stored in 4 bits (NF4)" in err
    assert "were stored in 4 bits" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "out-f32.gguf").tensors}
    up = tensors["blk.1.ffn_up.weight"]
    wanted = StoredWeights(work[1]).read("model.layers.1.mlp.up_proj.weight").numpy()
    assert (dequantize(up.data, up.tensor_type).reshape(wanted.shape) == wanted).all()


COMMANDS: dict[str, Callable[[Path, Path], tuple[Any, ...]]] = {
    "infer": lambda folder, _: ("infer", "--base_model", folder, *GREEDY),
    "chat": lambda folder, _: ("chat", "--base_model", folder),
    "train": lambda folder, out: (
        "train", "--model_name_or_path", folder, "--data_path", folder.parent / "t.jsonl", "--output_dir", out,
        "--use_lora",
    ),
    "merge": lambda folder, out: (
        "merge", "--base_model", folder, "--lora_model", folder.parent / "adapter", "--output_dir", out
    ),
    "export": lambda folder, out: ("export", "--base_model", folder, "--output_dir", out),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_other_quantised_models_are_refused(command: str, work: Work, tmp_path: Path) -> None:
    folder = work[0] / "gptq"
    if not folder.exists():
        shutil.copytree(work[0] / "base", folder)
        settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
        (folder / "config.json").write_text(json.dumps(settings))
    code, out, err = call(*COMMANDS[command](folder, tmp_path / "out"))
    assert (code, out) == (2, "")
    assert "quantised with gptq, which is not supported. Use the model in 16 bits" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
