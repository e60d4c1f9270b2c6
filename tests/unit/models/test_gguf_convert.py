"""Every form that an export may hold is read back: the model answers as one with the stored numbers as its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from gguf_twin import copy_gguf, in_form, random_blocks
from tiny_runs import lively, logits_of

from qingtune.commands.export import export
from qingtune.config.commands import ExportConfig
from qingtune.export.gguf_layout import layout_of
from qingtune.models.find import find_model
from qingtune.models.load import load_model, local_folder
from qingtune.models.stored_weights import StoredWeights

EXPORTED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0]
MADE_BY_LLAMA_CPP = [Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a tiny qwen2 whose rows divide into blocks of 256, and its export in fp32."""
    folder = tmp_path_factory.mktemp("exported")
    lively(make_model("qwen2", hidden_size=256, intermediate_size=256)).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    export(ExportConfig(base_model=str(folder / "model"), output_dir=str(folder / "out"), quantize=["f32"]))
    return folder / "model", folder / "out" / "out-f32.gguf"


@pytest.mark.parametrize("kind", [*EXPORTED, *MADE_BY_LLAMA_CPP])
def test_answers_are_those_of_the_stored_numbers(kind: Kind, exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, source = exported
    stored: dict[str, torch.Tensor] = {}
    as_gguf_writes_it = in_form(kind)

    def encode(name: str, numbers: Any) -> tuple[Any, Kind]:
        if numbers.ndim == 1 or kind in EXPORTED:
            data, form = as_gguf_writes_it(name, numbers)
        else:
            data, form = random_blocks(kind, *numbers.shape, seed=len(stored)), kind
        stored[name] = torch.from_numpy(dequantize(data, form).reshape(numbers.shape).astype(np.float32))
        return data, form

    copy_gguf(source, tmp_path / "m.gguf", encode)
    found = load_model(local_folder(find_model(str(tmp_path / "m.gguf"), None, "auto"), str(tmp_path)), torch.float32)
    wanted = load_model(folder, torch.float32)
    parameters = dict(wanted.named_parameters())
    with torch.no_grad():
        for tensor in layout_of(folder, StoredWeights(folder).shapes).tensors:
            parameters[tensor.source].copy_(stored[tensor.name].bfloat16())  # as it is converted
    torch.testing.assert_close(logits_of(found), logits_of(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_heads_and_experts_are_as_wide_as_the_file_says(kind: str, tmp_path: Path) -> None:
    if kind == "qwen3":
        lively(make_model(kind, head_dim=24)).save_pretrained(tmp_path / "model")
    else:
        sizes: dict[str, Any] = {
            "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 24,
            "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "norm_topk_prob": True, "eos_token_id": 2,
        }  # fmt: skip
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(**sizes)
        lively(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    export(ExportConfig(base_model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), quantize=["bf16"]))
    path = tmp_path / "out" / "out-bf16.gguf"
    found = load_model(local_folder(find_model(str(path), None, "auto"), str(tmp_path)), torch.float32)
    wanted = load_model(tmp_path / "model", torch.float32)
    assert float((logits_of(found) - logits_of(wanted)).abs().mean() / logits_of(wanted).std()) < 0.05
