"""The decoder of models with mixtures of experts: Transformers' loss and gradients, and buffers as planned."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from decoders import apart, batches, decoded, random_sample, reference
from mixtures import make_mixture
from test_memory_plan import held
from tiny_runs import assert_equal, lively

from qingtune.adapters.lora import add_lora, member
from qingtune.data.batch import collate
from qingtune.kernels.buffers import Arithmetic, buffers
from qingtune.kernels.decoder import TrainingDecoder, why_not
from qingtune.kernels.experts.block import ExpertsBlock
from qingtune.kernels.experts.buffers import filled_up
from qingtune.kernels.footprint import PassTokens
from qingtune.kernels.int8 import multiplies_int8
from qingtune.kernels.native import attention, few_rows, int8_products, low_rank
from qingtune.kernels.native import elementwise as in_c
from qingtune.models.quantize import quantize_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 moe": ("Qwen3Moe", {}),
    "shares as they are": ("Qwen3Moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "a dense layer": ("Qwen3Moe", {"mlp_only_layers": [0]}),
    "qwen3.5 moe": ("Qwen3_5MoeText", {}),
}
TRAINED: dict[str, list[str] | None] = {
    "lora": None,
    "lora on attention": ["q_proj", "o_proj"],
    "lora on down": ["v_proj", "experts.down_proj"],
    "lora on the last gates": ["layers.1.mlp.experts.gate_up_proj"],
}
LENGTH, SAMPLES, LONGER = 40, 2, 136


def make_decodable(name: str, trained: str = "lora", *, bits: int | None = None, **changes: Any) -> Any:
    kind, settings = MODELS[name]
    model = lively(make_mixture(kind, **(settings | changes)))
    if bits:
        quantize_model(model, bits, torch.device("cpu"))
    if trained != "full":
        add_lora(model, TRAINED[trained], 3, 6, 0.0)
        generator = torch.Generator().manual_seed(5)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lora_B"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    assert why_not(model) is None
    return model


def assert_same(model: Any, name: str, recompute: int) -> None:
    batch = batches()[name]
    decoder = TrainingDecoder(model, torch.float32, member, recompute=recompute)
    loss, gradients = decoded(model, batch, decoder=decoder)
    wanted_loss, wanted = reference(model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-6), name
    # Transformers' gradients of delta nets are up to 2.8e-4 from those in fp64, ours 9e-5.
    assert apart(gradients, wanted) < (5e-4 if model.config.model_type == "qwen3_5_moe_text" else 2e-5), name


@pytest.mark.parametrize("trained", ["full", *TRAINED])
@pytest.mark.parametrize("name", MODELS)
def test_same_as_transformers(name: str, trained: str) -> None:
    """Of samples end to end; the reference takes them one by one."""
    model = make_decodable(name, trained)
    for number, batch in enumerate(batches()):
        assert_same(model, batch, number % 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_experts_are_those_of_transformers_modules(bits: int) -> None:
    model = make_decodable("qwen3 moe", bits=bits)
    for number, batch in enumerate(batches()):
        assert_same(model, batch, number % 3)


@pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="there are no int8 products that are right")
def test_int8_units_are_near_the_dequantised_weights() -> None:
    """Tokens whose experts change by the rounding make more of a difference than in a dense model: all are chosen."""
    model = make_decodable("qwen3 moe", bits=8, num_experts_per_tok=6)
    units = TrainingDecoder(model, torch.float32, member, int8_units=True, recompute=1)
    for name, batch in batches().items():
        loss, gradients = decoded(model, batch, decoder=units)
        wanted_loss, wanted = decoded(model, batch)
        assert loss == pytest.approx(wanted_loss, rel=0.01), name
        assert 1e-4 < apart(gradients, wanted) < 0.3, name


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_recomputing_and_buffers_used_before_change_nothing_bit_for_bit(trained: str) -> None:
    model = make_decodable("qwen3 moe", trained)
    used = TrainingDecoder(model, torch.float32, member, recompute=1)
    for batch in [*batches().values(), *reversed(batches().values())]:
        loss, wanted = decoded(model, batch, decoder=TrainingDecoder(model, torch.float32, member))
        evaluated = float(used.loss(batch))
        assert all(parameter.grad is None for parameter in model.parameters())
        found_loss, found = decoded(model, batch, decoder=used)
        assert found_loss == loss
        assert evaluated == pytest.approx(loss, rel=1e-6)
        assert_equal(found, wanted)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_rows_that_are_filled_up_change_nothing(trained: str) -> None:
    """As they are for bf16 and int8, whatever the buffers held before."""
    model = make_decodable("qwen3.5 moe", trained)
    filled = TrainingDecoder(model, torch.float32, member, recompute=1)
    for mlp in filled.mlps:
        assert isinstance(mlp, ExpertsBlock)
        assert mlp.fills_beyond is None
        mlp.fills_beyond = 0
    for batch in batches().values():
        wanted_loss, wanted = decoded(model, batch)
        for buffer in filled.workspace._held.values():
            buffer.fill_(float("nan"))
        loss, gradients = decoded(model, batch, decoder=filled)
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert apart(gradients, wanted) < 1e-5


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_products_of_few_rows_in_c_are_as_exact_as_pytorchs(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where all experts are chosen, as rounding would change which."""
    if isinstance(found := few_rows.few_rows_library(), str):
        pytest.skip(found)
    model = make_decodable("qwen3 moe", trained, hidden_size=64, moe_intermediate_size=64, num_experts_per_tok=6)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    for parameter, other in zip(model.parameters(), rounded.parameters(), strict=True):
        parameter.data.copy_(other)
    differing = 0
    for batch in batches().values():
        wanted_loss, wanted = decoded(model, batch)
        errors: list[float] = []
        for in_c_too in (True, False):
            with monkeypatch.context() as context:
                if not in_c_too:
                    context.setattr(few_rows, "_library", lambda: None)
                decoder = TrainingDecoder(rounded, torch.bfloat16, member, recompute=1)
                loss, gradients = decoded(rounded, batch, decoder=decoder)
            assert loss == pytest.approx(wanted_loss, rel=0.01)
            errors.append(apart(gradients, wanted))
        assert errors[0] < 1.2 * errors[1]
        differing += errors[0] != errors[1]
    assert differing


@pytest.mark.parametrize(("rows", "wanted"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 80), (129, 160), (768, 768)])
def test_there_are_few_numbers_of_rows(rows: int, wanted: int) -> None:
    assert filled_up(rows) == wanted
    assert len({filled_up(number) for number in range(1, 769)}) == 22


@pytest.mark.parametrize("method", ["full", "lora", "lora on down", "qlora 4", "qlora 8"])
@pytest.mark.parametrize("name", ["qwen3 moe", "a dense layer"])
def test_every_buffer_has_its_planned_size(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_c, "elementwise", lambda: None)
    monkeypatch.setattr(int8_products, "_library", lambda: None)
    monkeypatch.setattr(few_rows, "_library", lambda: None)  # with it, rows are filled up beyond so many: at most
    trained, bits = ("lora", int(method[-1])) if method.startswith("qlora") else (method, None)
    for dtype, recompute, evaluates in itertools.product((torch.float32, torch.bfloat16), (0, 1, 2), (False, True)):
        model = make_decodable(name, trained, bits=bits, moe_intermediate_size=16)
        if trained != "full":
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
        decoder = TrainingDecoder(model, dtype, member, recompute=recompute, int8_units=bits == 8)
        batch = collate([random_sample(LENGTH, seed) for seed in range(SAMPLES)])
        longer = collate([random_sample(LONGER, 9)])
        if evaluates:
            decoder.loss(longer)
        decoder.add_gradients(batch, torch.tensor(1.0))
        how = Arithmetic(
            itemsize=dtype.itemsize,
            weight_itemsize=None if bits else model.get_input_embeddings().weight.dtype.itemsize,
            head_itemsize=model.get_input_embeddings().weight.dtype.itemsize,
            trains_weights=trained == "full",
            trains_head=trained == "full",
            low_rank_in_c=low_rank.native_low_rank(dtype, torch.device("cpu")) is not None,
            attention_in_c=attention.in_c(dtype, torch.device("cpu")),
            int8_units=bits == 8,
            recompute=recompute,
            gradient_below=trained == "full",
        )
        work = PassTokens(SAMPLES * LENGTH, len(batch.targets), LENGTH)
        evaluation = PassTokens(LONGER, len(longer.targets), LONGER) if evaluates else None
        assert buffers(decoder.sizes, how, work, evaluation) == held(decoder), (dtype, recompute, evaluates)
