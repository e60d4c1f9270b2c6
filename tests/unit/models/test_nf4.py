"""Models stored in 4 bits, as bitsandbytes writes them, are read as what they stand for; other forms are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from qingtune.errors import UserError
from qingtune.kernels.linear import NF4Linear, QuantizedLinear
from qingtune.models.base import load_base
from qingtune.models.find import NF4_MARK, find_model, stored_in_4bit, stored_numbers
from qingtune.models.load import load_model, local_folder
from qingtune.models.stored_weights import StoredWeights

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
DENSE = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(20)[None]


def quantised_by_library(folder: Path, *, nested: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that Transformers wrote with bitsandbytes, one layer dense, and its weights as those unpack them."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    make_model("qwen2", hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", DENSE],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder / "stored")
    make_tokenizer().save_pretrained(folder / "stored")
    weights = {name: tensor.data for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = dequantize_bnb_weight(module.weight)
    return folder / "stored", weights


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "plain scales"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    return quantised_by_library(tmp_path_factory.mktemp("nf4"), nested=request.param)


@pytest.fixture
def copy(library: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree(library[0], tmp_path / "copy")


def test_weights_are_those_that_the_library_unpacks(library: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = library
    stored = StoredWeights(folder)
    assert set(stored.shapes) == set(weights)
    assert len(stored.packed) == 13
    assert f"{DENSE}.weight" not in stored.packed
    for name, tensor in weights.items():
        assert stored.shapes[name] == tuple(tensor.shape)
        assert torch.equal(stored.read(name), tensor), name
    assert stored_in_4bit(folder)
    assert stored_numbers(folder) == sum(math.prod(tensor.shape) for tensor in weights.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_in_4_bits_takes_the_codes_as_they_are(
    dtype: torch.dtype, library: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, weights = library
    model: Any = load_base(folder, dtype, 4, CPU, str(tmp_path))
    files = load_file(folder / "model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 13
    assert isinstance(model.get_submodule(DENSE), torch.nn.Linear)
    for name, layer in layers.items():
        assert isinstance(layer, NF4Linear)
        assert torch.equal(layer.packed_tensors()["packed"], files[f"{name}.weight"])
        out = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
        for unpacked in (layer.dequantize(dtype), layer.dequantize(dtype, out)):
            assert torch.equal(unpacked, weights[f"{name}.weight"].to(dtype)), name
    with torch.inference_mode():
        ours, dense = (m(input_ids=IDS).logits for m in (model, load_model(folder, dtype)))
    torch.testing.assert_close(ours, dense)
    assert not list(tmp_path.iterdir())  # nothing to keep: it is packed already


def test_in_8_bits_it_is_what_the_unpacked_model_would_be(library: tuple[Path, Any], tmp_path: Path) -> None:
    from qingtune.models.quantize import quantize_model

    model: Any = load_base(library[0], torch.float32, 8, CPU, str(tmp_path))
    usual: Any = load_model(library[0], torch.float32)
    quantize_model(usual, 8, CPU)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, usual(input_ids=IDS).logits)


def test_an_unpacked_model_is_a_plain_one(library: tuple[Path, Any], tmp_path: Path) -> None:
    model = load_model(library[0], torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not StoredWeights(tmp_path).packed


def test_reading_says_that_it_is_in_4_bits(library: tuple[Path, Any], reported: Callable[[], list[str]]) -> None:
    local_folder(find_model(str(library[0]), None, "auto"), None)
    assert len(reported()) == 1
    assert "4 bits (NF4)" in reported()[0]


@pytest.mark.parametrize("shape", [(64, 64), (32, 32), (48, 96), (3, 7), (5, 24), (2, 1), (1, 2), (7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_divide_into_blocks_are_unpacked_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The library's CPU kernel takes wrong scales for them, some from beyond the last one."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 9, shape[0])[:, None]
    layer = NF4Linear(weight.to(dtype), None)
    out = torch.empty(shape, dtype=dtype)
    for found in (layer.dequantize(dtype), layer.dequantize(dtype, out)):
        # Half the widest step between two of NF4's levels, of the largest number in 64, and what scales lose in 8 bits.
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        most = (flat.abs().amax(1, keepdim=True) * 0.18 + 0.02).expand_as(flat).flatten()[: weight.numel()]
        assert bool(((found.float() - weight).abs().flatten() <= most).all())
        assert torch.equal(found, layer.dequantize(dtype))


# --- Refused ---------------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised with gptq,"),
    "awq": ({"quant_method": "awq"}, "quantised with awq,"),
    "fp8": ({"quant_method": "fp8"}, "quantised with fp8,"),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised with bitsandbytes in 8 bits,"),
    "fp4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"quantised with bitsandbytes \(fp4, stored as uint8\),",
    ),
    "wide storage": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16",
         "quant_method": "bitsandbytes"},
        r"quantised with bitsandbytes \(nf4, stored as bfloat16\),",
    ),
    "nameless": ({}, "quantised with an unnamed method,"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_are_refused_by_name(name: str, copy: Path) -> None:
    settings, told = OTHERS[name]
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(UserError, match=rf"copy: the weights are {told}") as error:
        find_model(str(copy), None, "auto")
    assert "Use the model in 16 bits" in str(error.value)


BROKEN: dict[str, Any] = {
    "no scales": lambda tensors: tensors.pop(f"{UP}.absmax"),
    "no table": lambda tensors: tensors.pop(f"{UP}.quant_map"),
    "short weight": lambda tensors: tensors.update({UP: tensors[UP][:-1]}),
    "short scales": lambda tensors: tensors.update({f"{UP}.absmax": tensors[f"{UP}.absmax"][:-1]}),
    "no JSON": lambda tensors: tensors.update({UP + NF4_MARK: torch.zeros(9, dtype=torch.uint8)}),
    "no weight": lambda tensors: tensors.pop(UP),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_told(name: str, bits: int | None, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    BROKEN[name](tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{UP} is in 4 bits.*Download it again"):
        load_base(copy, torch.float32, bits, CPU, str(tmp_path))


def test_layers_under_other_names_are_told(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.replace("up_proj", "upward"): tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    for bits in (None, 4):
        with pytest.raises(UserError, match=r"up_proj\.weight does not have the name and shape"):
            load_base(copy, torch.float32, bits, CPU, str(tmp_path))
