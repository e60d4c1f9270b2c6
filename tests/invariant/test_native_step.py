"""The kernels in C give what their twins in plain PyTorch give: products of every kind, and a whole step."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from native_twin import product, rounded, stands_for
from tiny_runs import lively

from qingtune import answering
from qingtune.adapters.targets import linear_layers
from qingtune.answering import load_decoder
from qingtune.hardware import Hardware
from qingtune.kernels import answer_cache
from qingtune.kernels.cached_decoder import CachedDecoder
from qingtune.kernels.native.build import has_native_units, native_library
from qingtune.kernels.native.matrices import FEW_ROWS, PackedBlocks, native_matrix
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")
BF16 = Hardware(CPU, torch.bfloat16, "")
IDS = [5, 17, 200, 3, 42, 42, 99, 310, 7, 11, 250]


def shape(hidden: int, inner: int, heads: int, keys: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": (
        "qwen2",
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "qwen3": (
        "qwen3",
        {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 96,
        },
    ),
    "llama": (
        "llama",
        {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
}

LIBRARY = native_library() if has_native_units() else "needs AVX-512 with int8 units"
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))


def library() -> ctypes.CDLL:
    assert isinstance(LIBRARY, ctypes.CDLL)
    return LIBRARY


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def apart_on_average(one: torch.Tensor, two: torch.Tensor) -> float:
    """For what goes through several roundings, which a small difference before them may turn either way."""
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 13, 16])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (80, 64)])
def test_products_of_few_rows(rows: int, columns: int, bits: int | None, count: int, threads: int) -> None:
    assert count <= FEW_ROWS
    weight, bias, x = random(rows, columns), random(rows, seed=1), random(count, columns, seed=2)
    x[0, :5] *= 40  # a group of other size than the rest
    matrix = native_matrix(library(), weight, bias, bits, Workspace(CPU))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = matrix.multiply(x)
    finally:
        torch.set_num_threads(before)
    wanted = product(weight, bits, x) + bias
    assert apart(found, wanted) < 1e-5
    added = random(count, rows, seed=3)
    assert apart(matrix.multiply(x, added.clone()), wanted + added) < 1e-5


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_products_of_many_rows(bits: int | None) -> None:
    weight, bias, x = random(48, 96), random(48, seed=1), random(FEW_ROWS + 4, 96, seed=2)
    found = native_matrix(library(), weight, bias, bits, Workspace(CPU)).multiply(x)
    assert apart(found, x @ stands_for(weight, bits).t() + bias) < 1e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_unpacked_they_are_what_they_stand_for(bits: int) -> None:
    weight = random(80, 96)
    weight[3, 32:64] = 0.5  # a group without spread
    matrix = native_matrix(library(), weight, None, bits, Workspace(CPU))
    assert isinstance(matrix, PackedBlocks)
    assert torch.equal(matrix.dense().t(), stands_for(weight, bits).bfloat16())
    assert 0 < apart(stands_for(weight, bits), weight) < 0.1


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bits: int | None, poison: float, rows: int) -> None:
    x = random(rows, 64)
    x[1, 40] = poison
    found = native_matrix(library(), random(16, 64), None, bits, Workspace(CPU)).multiply(x)
    assert found[[row for row in range(rows) if row != 1]].isfinite().all()
    assert not found[1].isfinite().any()


def opened(folder: Path, bits: int | None, slots: int = 1) -> CachedDecoder:
    decoder = load_decoder(folder, None, bits, BF16, None, slots, lambda _: None)
    assert isinstance(decoder, CachedDecoder)
    return decoder


def saved(tmp_path: Path, name: str, bits: int | None) -> tuple[Any, Path]:
    """A model that multiplies what the packed one multiplies, and where its weights were saved before."""
    kind, changes = MODELS[name]
    model = lively(make_model(kind, **changes)).bfloat16()
    for layer in linear_layers(model).values():  # attention that a rounding does not turn upside down
        assert isinstance(layer, torch.nn.Linear)
        layer.weight.data.mul_(0.3)
    model.save_pretrained(tmp_path / "model")
    model = model.float()
    for layer in (model.lm_head, *linear_layers(model).values()):
        assert isinstance(layer, torch.nn.Linear)
        layer.weight = torch.nn.Parameter(stands_for(layer.weight.data, bits))
        layer.register_forward_pre_hook(lambda _, inputs: rounded(inputs[0], bits))
    return model, tmp_path / "model"


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_steps_give_transformers_logits(
    name: str, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_cache, "CACHE_STEP", 8)  # grows within the sequence
    model, folder = saved(tmp_path, name, bits)
    decoder = opened(folder, bits)
    decoder.start(IDS[:1])
    for place in range(1, len(IDS)):  # nothing but steps
        found = decoder.step([IDS[place]])[0]
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([IDS[: place + 1]]), use_cache=False).logits[0, -1]
        assert apart_on_average(found, wanted) < (0.01 if bits is None else 0.03)  # keys and values are in bf16


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("slots", [2, 5, 16])
def test_slots_do_not_see_each_other(slots: int, bits: int | None, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "qwen3", None)
    many, alone = opened(folder, bits, 1), opened(folder, bits)
    many.make_slots(slots, 0)
    prompts = [[*IDS[: 1 + 5 * slot % 11], slot] for slot in range(slots)]
    for slot, prompt in enumerate(prompts):
        many.start(prompt, slot)
    for tokens in ([slot + 20 for slot in range(slots)], [9] * slots):
        found = many.step(tokens)
        for prompt, token, row in zip(prompts, tokens, found, strict=True):
            alone.start(prompt)
            assert apart_on_average(row, alone.step([token])[0]) < 0.03
            prompt.append(token)
    assert many._step is not None  # pyright: ignore[reportPrivateUsage]


def test_without_a_compiler_pytorch_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "llama", None)
    wanted = opened(folder, None).start(IDS)
    monkeypatch.setattr(answering, "native_library", lambda: "there is no C compiler")
    said: list[str] = []
    decoder = load_decoder(folder, None, None, BF16, None, 1, said.append)
    assert said == ["PyTorch's kernels, slower: there is no C compiler."]
    assert apart(decoder.start(IDS).float(), wanted.float()) < 0.02
