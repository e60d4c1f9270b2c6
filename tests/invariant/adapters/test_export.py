"""An exported model gives the logits of base and adapter, as another reader of GGUF sees it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf_twin import copy_gguf, in_form
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, lively_model, logits_of, save_model, train

from qingtune.commands import export as export_command
from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig
from qingtune.errors import UserError
from qingtune.export.gguf_layout import PlacedTensor
from qingtune.output.markdown import prose
from qingtune.runs.result_folder import RESULT_FILES

Trained = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path, data_file: Path) -> Trained:
    """A function that trains an adapter on a model of this kind, far enough to matter; returns its folder."""

    def train_adapter(kind: str, **settings: Any) -> Path:
        model = save_model(tmp_path / "model", kind)
        train(tmp_path / "adapter", model, data_file, max_steps=3, learning_rate=0.05, **LORA | settings)
        return tmp_path / "adapter"

    return train_adapter


def export_to(output: Path, adapter: Path | None, **settings: Any) -> None:
    lora = {} if adapter is None else {"lora_model": str(adapter)}
    export(ExportConfig(output_dir=str(output), **lora, **settings))


def read_by_transformers(path: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type == "qwen3":  # the reader takes all of them to be as wide as those that are published
        config.head_dim = GGUFReader(path).fields["qwen3.attention.key_length"].contents()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_exported_logits_are_those_of_base_and_adapter(kind: str, trained: Trained, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = trained(kind)
    output = tmp_path / "my shop"
    export_to(output, adapter, quantize=["f32", "q8_0"])
    assert sorted(path.name for path in output.iterdir()) == [
        "Modelfile", "README.md", "my-shop-f32.gguf", "my-shop-q8_0.gguf", RESULT_FILES
    ]  # fmt: skip
    wanted = adapted(tmp_path / "model", adapter)
    model = read_by_transformers(output / "my-shop-f32.gguf")
    assert float((logits_of(model) - wanted).abs().max()) < 1e-4
    assert model.config.eos_token_id == 2
    eighth = logits_of(read_by_transformers(output / "my-shop-q8_0.gguf"))
    assert 1e-4 < float((eighth - wanted).abs().mean() / wanted.std()) < 0.05
    ours, theirs = (
        AutoTokenizer.from_pretrained(adapter),
        AutoTokenizer.from_pretrained(output, gguf_file="my-shop-f32.gguf"),
    )
    text = "<|im_start|>user\n店名：蓝门 🥖 it's 12 o'clock\n\n  #bread<|im_end|>"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template


def test_base_alone_and_merged_models_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    export_to(tmp_path / "out", None, base_model=str(model), quantize=["f32"])
    told = capsys.readouterr().err
    steps = ("Writing out-f32.gguf", "Reading out-f32.gguf back", "Writing Modelfile and README.md ...")
    assert sorted(steps, key=told.index) == list(steps)
    wanted = logits_of(lively_model("qwen2"))
    assert float((logits_of(read_by_transformers(tmp_path / "out" / "out-f32.gguf")) - wanted).abs().max()) < 1e-4
    assert "Not known: the model brings no record" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no model was given"):
        export_to(tmp_path / "other", None)


def test_modelfile_and_card_tell_of_the_training(trained: Trained, tmp_path: Path) -> None:
    adapter = trained("qwen2", system_prompt="Be kind.\n你好")
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 0], "temperature": 0.5, "repetition_penalty": 1.1})
    )
    export_to(tmp_path / "shop", adapter)
    text = (tmp_path / "shop" / "Modelfile").read_text(encoding="utf-8")
    assert text.splitlines()[1] == "FROM ./shop-q8_0.gguf"
    assert 'SYSTEM """Be kind.\n你好"""' in text
    assert re.findall(r"PARAMETER (.*)", text) == ['stop "<|im_end|>"', "temperature 0.5", "repeat_penalty 1.1"]
    card = (tmp_path / "shop" / "README.md").read_text(encoding="utf-8")
    record = json.loads((adapter / "qingtune.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in card
    assert card.startswith("---\nlibrary_name: gguf\n")
    for wanted in (
        record["base_fingerprint"], record["settings"]["data"], "| method | LoRA |", "`train.jsonl`",
        "| `learning_rate` | `0.05` |", "| `lora_r` | `4` |", "| optimizer steps | 3 |", "last logged", "tokens/s |",
        "shop-q8_0.gguf", "Q8_0 0.", "The licence is not known", "name on a hub is not known",
    ):  # fmt: skip
        assert wanted in card, wanted
    assert "`output_dir`" not in card
    assert "`lr_scheduler_type`" not in card  # a default

    export_to(tmp_path / "other", adapter, system_prompt="")
    assert "SYSTEM" not in (tmp_path / "other" / "Modelfile").read_text(encoding="utf-8")


def test_k_quants_are_made_of_a_file_in_16_bits(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained("qwen2")
    made: list[tuple[str, str]] = []

    def quantize(source: Path, target: Path, form: str, _: int) -> None:
        made.append((source.name, target.name))
        copy_gguf(source, target, in_form({"q4_k_m": Kind.Q5_0, "q6_k": Kind.Q8_0}[form]))

    monkeypatch.setattr(export_command, "quantize_gguf", quantize)
    monkeypatch.setattr(export_command, "require_quantizer", lambda: None)
    output = tmp_path / "out"
    export_to(output, adapter, quantize="Q4_K_M,q6_k")
    assert made == [("out-bf16.gguf", "out-q4_k_m.gguf"), ("out-bf16.gguf", "out-q6_k.gguf")]
    assert sorted(path.name for path in output.glob("*.gguf")) == ["out-q4_k_m.gguf", "out-q6_k.gguf"]
    assert (output / "Modelfile").read_text(encoding="utf-8").splitlines()[1] == "FROM ./out-q4_k_m.gguf"
    wanted = adapted(tmp_path / "model", adapter)
    sixth = logits_of(read_by_transformers(output / "out-q6_k.gguf"))
    assert 1e-4 < float((sixth - wanted).abs().mean() / wanted.std()) < 0.05
    told = capsys.readouterr().err
    assert "Q5_0 4." in told
    rows = (
        "q4_k_m: 15 of 26 tensors have rows that are not a multiple of 256, as K-quants need; llama.cpp keeps them as"
    )
    assert f"Note: {rows} Q5_0 (15)." in told
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"- {prose(f'{rows} Q5_0 (15).')}" in card
    assert " (15), F32 0.000% (11) |" in card

    export_to(output, adapter, quantize="q6_k,bf16", overwrite_output_dir=True)
    assert sorted(path.name for path in output.glob("*.gguf")) == ["out-bf16.gguf", "out-q6_k.gguf"]
    assert capsys.readouterr().err.count("Writing out-bf16.gguf") == 1


def test_ctrl_c_while_llama_cpp_works_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "qwen2")

    def interrupted(_: Path, target: Path, *__: object) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export_command, "quantize_gguf", interrupted)
    monkeypatch.setattr(export_command, "require_quantizer", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        export_to(tmp_path / "out", None, base_model=str(model), quantize="q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_k_quants_without_llama_cpp_are_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        export_to(tmp_path / "out", None, base_model=str(tmp_path / "none"), quantize="f32,q4_k_m")
    assert list(tmp_path.iterdir()) == []


def test_a_model_trained_on_text_gets_no_template(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Fresh bread at {number}."} for number in range(8)])
    train(tmp_path / "adapter", model, data, max_steps=1, **LORA)
    export_to(tmp_path / "out", tmp_path / "adapter")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "tokenizer.chat_template" not in GGUFReader(tmp_path / "out" / "out-q8_0.gguf").fields


def test_refusals_leave_nothing_behind(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained("llama")
    before = sorted(tmp_path.iterdir())
    output = tmp_path / "out"
    with monkeypatch.context() as context:
        written_first = iter([True] * 21)  # tensors of the tiny model; reading back, another order is wanted
        context.setattr(PlacedTensor, "arrange", lambda _, t: t if next(written_first, False) else t.flip(0))
        with pytest.raises(UserError, match="differs by"):
            export_to(output, adapter)
    assert sorted(tmp_path.iterdir()) == before

    export_to(output, adapter)
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        export_to(output, adapter)
    export_to(output, adapter, overwrite_output_dir=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt \(not of it\)"):
        export_to(output, adapter, overwrite_output_dir=True)

    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.7.* which this base does not have"):
        export_to(tmp_path / "next", adapter)
    lively_model("llama", seed=7).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="weights other than"):
        export_to(tmp_path / "next", adapter)
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=["own head", "dora"])
def test_other_kinds_of_adapters_are_exported(settings: dict[str, Any], trained: Trained, tmp_path: Path) -> None:
    adapter = trained("qwen2", **settings)
    export_to(tmp_path / "out", adapter, quantize=["f32"])
    model = read_by_transformers(tmp_path / "out" / "out-f32.gguf")
    wanted = adapted(tmp_path / "model", adapter)
    assert float((logits_of(model) - wanted).abs().max()) < 1e-3
    assert model.config.tie_word_embeddings is ("modules_to_save" not in settings)
