"""The kernels in C give what their twins in plain PyTorch give: products of every kind, and a whole step."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from native_twin import VARIANTS, Variant, product, rounded, stands_for, upper_24_bits
from tiny_runs import lively

from qingtune.adapters.lora import add_lora, lora_layers
from qingtune.adapters.peft_files import save_adapter
from qingtune.answering import assembly, load
from qingtune.answering.decoder import cache
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.answering.decoder.native.matrices import FEW_ROWS, NativeMatrix
from qingtune.answering.generate import Decoding, generate
from qingtune.answering.load import ModulesDecoder, load_decoder
from qingtune.kernels.device import Hardware
from qingtune.kernels.workspace import Workspace
from qingtune.models.layers import linear_layers
from qingtune.models.load import load_model

CPU = torch.device("cpu")
BF16, FP32 = (Hardware(CPU, dtype, "") for dtype in (torch.bfloat16, torch.float32))
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

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(params=VARIANTS, autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Each variant of the kernels in turn; answers are made with it."""
    variant: Variant = request.param
    for name, value in variant.environment().items():
        monkeypatch.setenv(name, value)
    assert has_native_units()
    compiled = native_library(*variant.flags)
    if compiled == "there is no C compiler (cc, gcc or clang)":
        pytest.skip(compiled)
    assert isinstance(compiled, ctypes.CDLL)
    monkeypatch.setattr(assembly, "native_library", lambda: compiled)
    return compiled


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def apart_on_average(one: torch.Tensor, two: torch.Tensor) -> float:
    """For what goes through several roundings, which a small difference before them may turn either way."""
    return float((one - two).norm() / two.norm())


def check_products(
    library: ctypes.CDLL, weight: torch.Tensor, bits: int | None, hardware: Hardware, count: int, threads: int
) -> None:
    rows, columns = weight.shape
    bias, x = random(rows, seed=1), random(count, columns, seed=2)
    x[0, :5] *= 40  # a group of other size than the rest
    matrix = NativeMatrix(library, weight, bias, bits, hardware.dtype, Workspace(CPU))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = matrix.multiply(x)
    finally:
        torch.set_num_threads(before)
    wanted = product(weight, bits, x, hardware.dtype) + bias
    assert apart(found, wanted) < 1e-5
    added = random(count, rows, seed=3)
    assert apart(matrix.multiply(x, added.clone()), wanted + added) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 13, 16])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (41, 96), (80, 64)])
def test_products_of_few_rows(
    library: ctypes.CDLL, rows: int, columns: int, bits: int | None, count: int, threads: int
) -> None:
    assert count <= FEW_ROWS
    check_products(library, random(rows, columns), bits, BF16, count, threads)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 17, 48, 77])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32, 8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (144, 96), (80, 2080)])
def test_products_beside_fp32(
    library: ctypes.CDLL, rows: int, columns: int, kept: torch.dtype | int, count: int, threads: int
) -> None:
    weight, bits = random(rows, columns), kept if isinstance(kept, int) else None
    check_products(library, weight.to(kept) if isinstance(kept, torch.dtype) else weight, bits, FP32, count, threads)


def test_24_bits_are_256_times_as_exact_as_bf16(library: ctypes.CDLL) -> None:
    weight = random(64, 4864)
    assert ((upper_24_bits(weight) - weight).abs() <= weight.abs() * 2.0**-16).all()
    matrix = NativeMatrix(library, weight, None, None, torch.float32, Workspace(CPU))
    assert matrix.weight.nbytes == 3 * weight.numel()
    assert torch.equal(matrix.multiply(torch.eye(4864)[:100]).t(), upper_24_bits(weight[:, :100]))
    x = random(4, 4864, seed=1)
    wanted = x.double() @ weight.double().t()
    assert float((matrix.multiply(x).double() - wanted).norm() / wanted.norm()) < 8e-6


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_products_of_many_rows(library: ctypes.CDLL, bits: int | None) -> None:
    weight, bias, x = random(43, 96), random(43, seed=1), random(FEW_ROWS + 4, 96, seed=2).bfloat16()
    found = NativeMatrix(library, weight, bias, bits, torch.bfloat16, Workspace(CPU)).multiply(x)
    wanted = product(weight, bits, x.float(), torch.bfloat16) + bias  # in 8 and 4 bits some CPUs do not round x
    assert apart(found.float(), wanted) < 1e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_unpacked_they_are_what_they_stand_for(library: ctypes.CDLL, bits: int) -> None:
    weight = random(80, 96)
    weight[3, 32:64] = 0.5  # a group without spread
    matrix = NativeMatrix(library, weight, None, bits, torch.bfloat16, Workspace(CPU))
    assert torch.equal(matrix.dense().t(), stands_for(weight, bits).bfloat16())
    assert 0 < apart(stands_for(weight, bits), weight) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("rows", [2, 5, 50])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(
    library: ctypes.CDLL, bits: int | None, poison: float, rows: int, dtype: torch.dtype
) -> None:
    x = random(rows, 64)
    x[1, 40] = poison
    found = NativeMatrix(library, random(16, 64), None, bits, dtype, Workspace(CPU)).multiply(x)
    assert found[[row for row in range(rows) if row != 1]].isfinite().all()
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, 0x7F800000])
def test_a_weight_that_is_not_finite_stays_so(library: ctypes.CDLL, bits: int, kept: torch.dtype) -> None:
    weight = random(16, 64)
    weight.view(torch.int32)[3, 40] = bits
    matrix = NativeMatrix(library, weight.to(kept), None, None, torch.float32, Workspace(CPU))
    for rows in (1, 5, 50):
        found = matrix.multiply(random(rows, 64, seed=1))
        assert not found[:, 3].isfinite().any()
        assert found[:, [row for row in range(16) if row != 3]].isfinite().all()


def opened(
    folder: Path, bits: int | None, slots: int = 1, hardware: Hardware = BF16, adapter: Path | None = None
) -> CachedDecoder:
    decoder = load_decoder(folder, adapter, bits, hardware, None, slots)
    assert isinstance(decoder, CachedDecoder)
    assert decoder._step is not None  # pyright: ignore[reportPrivateUsage]
    return decoder


def saved(tmp_path: Path, name: str, bits: int | None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Path]:
    """A model that multiplies what the packed one multiplies, and where its weights were saved before."""
    kind, changes = MODELS[name]
    made = lively(make_model(kind, **changes)).to(dtype)
    for layer in linear_layers(made).values():  # attention that a rounding does not turn upside down
        assert isinstance(layer, torch.nn.Linear)
        layer.weight.data.mul_(0.3)
    made.save_pretrained(tmp_path / "model")
    model: Any = load_model(tmp_path / "model", torch.float32)
    for layer in (model.lm_head, *linear_layers(model).values()):
        assert isinstance(layer, torch.nn.Linear)
        if bits is not None:
            layer.weight = torch.nn.Parameter(stands_for(layer.weight.data, bits))
        layer.register_forward_pre_hook(lambda _, inputs: rounded(inputs[0], bits))
    return model, tmp_path / "model"


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_steps_give_transformers_logits(
    name: str, bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CACHE_STEP", 8)  # grows within the sequence
    model, folder = saved(tmp_path, name, bits)
    decoder = opened(folder, bits)
    decoder.start(IDS[:1])
    for place in range(1, len(IDS)):  # nothing but steps
        found = decoder.step([IDS[place]])[0]
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([IDS[: place + 1]]), use_cache=False).logits[0, -1]
        assert apart_on_average(found, wanted) < (0.01 if bits is None else 0.03)  # keys and values are in bf16


@pytest.mark.parametrize(
    ("bits", "stored"), [(None, "bfloat16"), (None, "float16"), (None, "float32"), (8, "bfloat16"), (4, "float32")]
)
@pytest.mark.parametrize("name", MODELS)
def test_beside_fp32_answers_are_those_of_transformers_in_fp32(
    name: str, bits: int | None, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CACHE_STEP", 8)
    model, folder = saved(tmp_path, name, bits, getattr(torch, stored))
    decoder = opened(folder, bits, hardware=FP32)
    assert decoder.start(IDS[:4]).dtype == torch.float32  # a prompt goes through C as well
    for place in range(4, len(IDS)):
        found = decoder.step([IDS[place]])[0]
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([IDS[: place + 1]]), use_cache=False).logits[0, -1]
        assert apart_on_average(found, wanted) < (1e-4 if bits is None else 0.02)  # a rounding may turn either way
    greedy = Decoding(max_new_tokens=30, temperature=0)
    if bits is None:
        mine = list(generate(decoder, IDS, greedy, frozenset()))
        assert mine == list(generate(ModulesDecoder(model), IDS, greedy, frozenset()))


def test_what_an_adapter_adds_is_not_lost_beside_fp32(tmp_path: Path) -> None:
    """A change below a step of bf16, as of a short training, would vanish if the merged weights were cut to bf16."""
    _, folder = saved(tmp_path, "qwen2", None)
    model = load_model(folder, torch.float32)
    add_lora(model, TARGETS, r=4, alpha=8, dropout=0.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=1e-4)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(folder), 0.0)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    without = opened(folder, None, hardware=FP32).start(IDS)
    found = opened(folder, None, hardware=FP32, adapter=tmp_path / "adapter").start(IDS)
    assert float((found - wanted).norm()) < 0.05 * float((without - wanted).norm())


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


def test_memory_is_asked_for_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 without the kernels 4 bytes a weight, with them 2, and 3 where an adapter changes them."""
    _, folder = saved(tmp_path, "qwen2", None)
    asked: list[float | None] = []
    monkeypatch.setattr(load, "check_memory", lambda _folder, _dtype, bits, _device: asked.append(bits))
    opened(folder, None, hardware=FP32)
    opened(folder, 8, hardware=FP32)
    opened(folder, None)
    monkeypatch.setattr(assembly, "native_library", lambda: "there is no C compiler")
    load_decoder(folder, None, None, FP32, None, 1)
    assert asked == [16, 8, None, None]


def test_4_bits_need_no_kernels_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs without AVX-512 PyTorch packs 4 bits in another layout."""
    _, folder = saved(tmp_path, "llama", None)
    monkeypatch.setattr(load, "has_int4_kernels", lambda: False)
    opened(folder, 4, hardware=FP32)
    monkeypatch.setattr(assembly, "native_library", lambda: "there is no C compiler")
    *_, reason = load.open_model(folder, None, 4, FP32)
    assert reason == "this machine's PyTorch packs 4 bits in a layout not known here, and there is no C compiler"


def test_without_a_compiler_pytorch_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "llama", None)
    wanted = opened(folder, None).start(IDS)
    monkeypatch.setattr(assembly, "native_library", lambda: "there is no C compiler")
    decoder = load_decoder(folder, None, None, BF16, None, 1)
    assert apart(decoder.start(IDS).float(), wanted.float()) < 0.02
