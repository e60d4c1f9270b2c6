"""Every family of models answers from the cache as Transformers does without one: chunks, slots, reused beginnings,
adapters, packed weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import native_twin
import pytest
import torch
import transformers
from packed_twin import stands_for
from tiny_runs import lively, move_adapters

from qingtune.adapters.lora import add_lora, lora_layers, merge_lora
from qingtune.adapters.peft_files import save_adapter
from qingtune.answering import assembly
from qingtune.answering.assembly import MODEL_TYPES
from qingtune.answering.decoder import cache, cached, packed
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.layer import DeltaBlock
from qingtune.answering.decoder.native.answer_step import AnswerStep
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.answering.decoder.native.matrices import NativeMatrix
from qingtune.answering.decoder.packed import has_int4_kernels
from qingtune.answering.generate import Decoding, generate, generate_many
from qingtune.answering.load import load_decoder
from qingtune.kernels.device import Hardware

needs_c = pytest.mark.skipif(
    not has_native_units() or isinstance(native_library(), str), reason="there are no kernels in C here"
)
FP32 = Hardware(torch.device("cpu"), torch.float32, "")
NEVER: frozenset[int] = frozenset()
IDS = [5, 17, 200, 3, 42, 42, 99, 310, 7, 11, 250, 12, 64, 8, 301, 9, 77, 23, 150, 31]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
LLAMA_4_SCALING = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.3], "long_factor": [1.0, 4.0]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "qwen3 windows": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 5, "tie_word_embeddings": True}),
    "ministral": ("MinistralConfig", {"sliding_window": 5, "layer_types": MIXED}),
    "ministral 3": ("Ministral3Config", {"sliding_window": None, "rope_parameters": LLAMA_4_SCALING}),
    "gemma 2": (
        "Gemma2Config",
        {
            "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi 3": ("Phi3Config", {"sliding_window": 5, "original_max_position_embeddings": 256}),
    "phi 4 longrope": (
        "Phi3Config",
        {
            "hidden_size": 64, "head_dim": 16, "partial_rotary_factor": 0.25, "rope_scaling": LONG,
            "original_max_position_embeddings": 12, "sliding_window": None,
        },
    ),
}  # fmt: skip


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES |= {
    "qwen3 moe": ("Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3 moe unnormalised": ("Qwen3MoeConfig", {**EXPERTS, "tie_word_embeddings": True}),
}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}  # fmt: skip
FAMILIES |= {
    "qwen3.5": ("Qwen3_5TextConfig", {**DELTA, "tie_word_embeddings": True}),
    "qwen3.5 moe": ("Qwen3_5MoeTextConfig", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
}


def made(name: str) -> Any:
    """A lively model of a family, of weights that bf16 holds: so they are exact in all ways to keep them."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**(SIZES | changes))
    model = lively(transformers.AutoModelForCausalLM.from_config(config))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    def save(name: str) -> tuple[Any, Path]:
        model = made(name)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the cache grow within a sequence."""
    monkeypatch.setattr(cache, "CACHE_STEP", 8)


@pytest.fixture(params=["PyTorch", pytest.param("C", marks=needs_c)])
def in_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether new tokens are computed in C; otherwise nothing is."""
    if request.param == "PyTorch":
        request.getfixturevalue("without_c")
    return request.param == "C"


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "native_library", lambda: "there is no C compiler")


def steps_in_c(decoder: CachedDecoder) -> bool:
    return decoder._step is not None  # pyright: ignore[reportPrivateUsage]


def opened(folder: Path, adapter: Path | None = None, bits: int | None = None, slots: int = 1) -> CachedDecoder:
    decoder = load_decoder(folder, adapter, bits, FP32, None, slots)
    assert isinstance(decoder, CachedDecoder)
    return decoder


@torch.inference_mode()
def last_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1).logits[0, -1]


def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of every place, each as the last one of a sequence: some positions change with the sequence's length."""
    return torch.stack([last_logits(model, ids[: end + 1]) for end in range(len(ids))])


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def round_weights(model: Any, rounded: Callable[[torch.Tensor], torch.nn.Parameter]) -> None:
    """Give a model the weights that packed ones stand for."""
    model.lm_head.weight = rounded(model.lm_head.weight.data)  # apart from the embedding, which stays whole
    for module in model.model.modules():
        # The shared expert's share and a delta net's gates stay.
        if isinstance(module, torch.nn.Linear) and module.out_features not in (1, DELTA["linear_num_value_heads"]):
            module.weight = rounded(module.weight.data)
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(experts := getattr(module, name, None), torch.nn.Parameter):
                experts.data = torch.stack([rounded(expert) for expert in experts.data])


def test_every_architecture_is_tested() -> None:
    tested = {getattr(transformers, kind).model_type for kind, _ in FAMILIES.values()}
    assert tested | {"llama"} == MODEL_TYPES  # test_answering.py has Llama


@pytest.mark.parametrize(
    ("chunk", "in_c"),
    [(1, "PyTorch"), (4, "PyTorch"), (100, "PyTorch"), pytest.param(4, "C", marks=needs_c)],
    indirect=["in_c"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(
    name: str, chunk: int, in_c: bool, saved: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "CHUNK", chunk)
    model, folder = saved(name)
    wanted = logits_of(model, IDS)
    decoder = opened(folder)
    assert steps_in_c(decoder) == in_c
    assert apart(decoder.start(IDS[:9]), wanted[8]) < 1e-4
    for place in range(9, len(IDS)):
        assert apart(decoder.step([IDS[place]])[0], wanted[place]) < 1e-4
    assert apart(decoder.start(IDS[:7]), wanted[6]) < 1e-4  # goes back
    assert apart(decoder.start(IDS), wanted[-1]) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_at_places_are_transformers(name: str, saved: Callable[[str], tuple[Any, Path]]) -> None:
    model, folder = saved(name)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    found = torch.cat(list(opened(folder).logits_at(IDS, range(len(IDS)))))
    assert apart(found, wanted) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("in_c")
def test_slots_beginnings_and_moves_change_nothing(name: str, saved: Callable[[str], tuple[Any, Path]]) -> None:
    model, folder = saved(name)
    sequences = [IDS[:3], [*IDS[:8], 77, 78, 79], IDS[:18], [9, 9]]
    decoder = opened(folder, slots=4)
    for slot, ids in enumerate(sequences):
        assert apart(decoder.start(ids, slot), last_logits(model, ids)) < 2e-4
    for token in range(40, 50):
        logits = decoder.step([token + slot for slot in range(len(sequences))])
        sequences = [[*ids, token + slot] for slot, ids in enumerate(sequences)]
        for found, ids in zip(logits, sequences, strict=True):
            assert apart(found, last_logits(model, ids)) < 2e-4
    decoder.move(3, 0)
    other = [*sequences[1][:-2], 5, 6]
    assert apart(decoder.start(other, 2), last_logits(model, other)) < 2e-4
    logits = decoder.step([1, 2, 3])
    for found, ids in zip(logits, ([*sequences[3], 1], [*sequences[1], 2], [*other, 3]), strict=True):
        assert apart(found, last_logits(model, ids)) < 2e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("in_c")
def test_many_answers_are_those_of_one_at_a_time(name: str, saved: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = saved(name)
    prompts = [[*IDS[: 1 + 7 * number % 11], number] for number in range(6)]
    decodings = [Decoding(max_new_tokens=2 + 5 * (number % 4), temperature=0) for number in range(6)]
    alone = [list(generate(opened(folder), p, d, NEVER)) for p, d in zip(prompts, decodings, strict=True)]
    found = dict(generate_many(opened(folder, slots=3), prompts, decodings, NEVER))
    assert [found[number] for number in range(6)] == alone


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_broken_off_is_read_again(
    name: str, in_c: bool, saved: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(name)
    decoder = opened(folder)
    decoder.start(IDS[:4])
    calls: list[int] = []
    right, step = cached.AnswerLayer.forward, AnswerStep.logits

    def broken_off(*arguments: Any, **settings: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments, **settings)

    def broken_off_behind_c(*arguments: Any) -> torch.Tensor:
        step(*arguments)
        raise KeyboardInterrupt

    for run in (lambda: decoder.start(IDS[:9]), lambda: decoder.step([8])):
        calls.clear()
        with monkeypatch.context() as context:
            context.setattr(cached.AnswerLayer, "forward", broken_off)
            context.setattr(AnswerStep, "logits", broken_off_behind_c)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert apart(decoder.start(IDS[:6]), last_logits(model, IDS[:6])) < 1e-4


@pytest.mark.usefixtures("without_c")
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_is_merged(name: str, tmp_path: Path, saved: Callable[[str], tuple[Any, Path]]) -> None:
    base, folder = saved(name)
    before = last_logits(base, IDS)
    model = made(name)
    add_lora(model, None, r=3, alpha=6, dropout=0.0)
    move_adapters(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", "base", 0.0)
    wanted = last_logits(model, IDS)
    assert lora_layers(model)
    assert apart(before, wanted) > 1e-2
    assert apart(opened(folder, tmp_path / "adapter").start(IDS), wanted) < 1e-4
    merge_lora(model)
    assert apart(last_logits(model, IDS), wanted) < 1e-4


@pytest.mark.parametrize(
    "bits",
    [8, pytest.param(4, marks=pytest.mark.skipif(not has_int4_kernels(), reason="PyTorch has no such kernels here"))],
)
@pytest.mark.usefixtures("without_c")
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_stand_for_rounded_ones(
    name: str, bits: int, saved: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qingtune.answering.assembly.has_int8_units", lambda _: False)
    model, folder = saved(name)
    decoder = opened(folder, bits=bits)

    def rounded(weight: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(stands_for(weight, bits if weight.shape[1] % 32 == 0 else 8))

    round_weights(model, rounded)
    wanted = logits_of(model, IDS)
    assert apart(decoder.start(IDS[:15]), wanted[14]) < 0.1  # few rows, rounded to bf16: packed products
    assert apart(decoder.step([IDS[15]])[0], wanted[15]) < 0.1
    monkeypatch.setattr(packed, "UNPACK_FROM", {8: 1, 4: 1})
    assert apart(opened(folder, bits=bits).start(IDS), wanted[-1]) < 1e-4  # many rows: unpacked


WIDE = {
    "hidden_size": 256, "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 6,  # all, as rounded activations may choose others
}  # fmt: skip


def test_positions_are_computed_as_far_as_the_cache_reaches(saved: Callable[[str], tuple[Any, Path]]) -> None:
    _, folder = saved("gemma 3")
    decoder = opened(folder)
    for length, positions in ((1, 8), (7, 8), (9, 16), (20, 32)):
        decoder.start(IDS[:length])
        assert {len(part) for table in decoder.rotary.tables.values() for part in table} == {positions}


@needs_c
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "name", ["mistral window", "gemma 2", "gemma 3", "phi 4 longrope", "qwen3 moe", "qwen3.5", "qwen3.5 moe"]
)
def test_matrices_in_c(name: str, bits: int | None, tmp_path: Path) -> None:
    kind, changes = FAMILIES[name]
    config = getattr(transformers, kind)
    known = set(inspect.signature(config).parameters)
    settings = {**SIZES, **changes, **{size: value for size, value in WIDE.items() if size in known}}
    if name == "phi 4 longrope":  # whose heads are as large as its hidden size says
        settings |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:2]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**settings)).eval()
    model.save_pretrained(tmp_path)
    if bits:
        round_weights(model, lambda weight: torch.nn.Parameter(native_twin.stands_for(weight, bits)))
    decoder = opened(tmp_path, bits=bits)
    mixer = next(iter(decoder.layers)).mixer
    matrices = (decoder.head, mixer.qkv_z if isinstance(mixer, DeltaBlock) else mixer.qkv)
    assert all(isinstance(matrix, NativeMatrix) for matrix in matrices)
    assert steps_in_c(decoder)
    wanted = logits_of(model, IDS)
    bound = 0.05 if bits else 1e-4  # what few bits are multiplied with is rounded to int8
    assert distance(decoder.start(IDS[:9]), wanted[8]) < bound
    for place in range(9, len(IDS)):
        assert distance(decoder.step([IDS[place]])[0], wanted[place]) < bound
