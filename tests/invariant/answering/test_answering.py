"""The decoder with a cache gives what Transformers gives: every kind of model, adapters, packed weights, many slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from decoders import MODELS, make_decodable
from packed_twin import stands_for
from tiny_runs import LORA, lively, lively_model, save_model, train

from qingtune.adapters.lora import lora_layers, merge_lora
from qingtune.adapters.peft_files import load_adapter, save_adapter
from qingtune.answering import assembly
from qingtune.answering.decoder import cache, cached
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.packed import Int4Matrix, Int8Matrix, has_int4_kernels
from qingtune.answering.generate import Decoding, generate, generate_many
from qingtune.answering.load import Decoder, ModulesDecoder, load_decoder
from qingtune.commands.merge import merge
from qingtune.config.commands import MergeConfig
from qingtune.errors import UserError
from qingtune.kernels.device import Hardware, has_int8_units
from qingtune.models.layers import linear_layers
from qingtune.models.load import load_model

FP32 = Hardware(torch.device("cpu"), torch.float32, "")
IDS = [5, 17, 200, 3, 42, 42, 99, 310, 7, 11, 250]
NEVER: frozenset[int] = frozenset()


def opened(
    folder: Path, adapter: Path | None = None, bits: int | None = None, slots: int = 1, hardware: Hardware = FP32
) -> CachedDecoder:
    decoder = load_decoder(folder, adapter, bits, hardware, None, slots)
    assert isinstance(decoder, CachedDecoder)
    return decoder


def saved(tmp_path: Path, name: str) -> tuple[Any, Path]:
    """A model as Transformers loads it: a Mistral that lists layer types becomes a Ministral, which looks at them."""
    kind, changes = MODELS[name]
    lively(make_model(kind, **changes)).save_pretrained(tmp_path / "model")
    return load_model(tmp_path / "model", torch.float32).eval(), tmp_path / "model"


@torch.inference_mode()
def logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "CHUNK", chunk)
    monkeypatch.setattr(cache, "CACHE_STEP", 8)  # grows within the sequence
    model, folder = saved(tmp_path, name)
    wanted = logits_of(model, IDS)
    decoder = opened(folder)
    assert apart(decoder.start(IDS[:6]), wanted[5]) < 1e-4
    for place in range(6, len(IDS)):
        assert apart(decoder.step([IDS[place]])[0], wanted[place]) < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_greedy_is_transformers(name: str, tmp_path: Path) -> None:
    model, folder = saved(tmp_path, name)
    greedy = Decoding(max_new_tokens=40, temperature=0)
    mine = list(generate(opened(folder), IDS, greedy, NEVER))
    assert mine == list(generate(ModulesDecoder(model), IDS, greedy, NEVER))
    assert len(set(mine)) > 2


@pytest.mark.parametrize("name", ["qwen2", "qwen3 untied", "llama"])
def test_adapter_is_merged(name: str, tmp_path: Path) -> None:
    model = make_decodable(name, "lora on k and down")
    wanted = logits_of(model, IDS)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", "base", 0.0)
    for layer in lora_layers(model).values():  # take the adapters out again
        layer.lora_B.data.zero_()
    merge_lora(model)
    model.save_pretrained(tmp_path / "model")
    without = opened(tmp_path / "model").start(IDS)
    found = opened(tmp_path / "model", tmp_path / "adapter").start(IDS)
    assert apart(found, wanted[-1]) < 1e-4
    assert apart(without, wanted[-1]) > 1e-2


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_decodable("qwen2", "lora on q")
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", "base", 0.0)
    lively_model("qwen2", num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(UserError, match="another model"):
        opened(tmp_path / "shallow", tmp_path / "adapter")
    lively_model("qwen2", hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="does not fit"):
        opened(tmp_path / "wide", tmp_path / "adapter")


NEEDS_INT4 = pytest.mark.skipif(not has_int4_kernels(), reason="needs PyTorch's kernels for 4 bits")


@pytest.mark.parametrize(("bits", "kind"), [pytest.param(4, Int4Matrix, marks=NEEDS_INT4), (8, Int8Matrix)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama biases linear"])
def test_packed_weights_give_the_logits_of_what_they_stand_for(
    name: str, bits: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "has_int8_units", lambda _: False)  # they take rounded activations
    model, folder = saved(tmp_path, name)
    decoder = opened(folder, bits=bits)
    assert isinstance(decoder.head, kind)
    assert isinstance(next(iter(decoder.layers)).mixer.qkv, kind)

    def rounded(weight: torch.Tensor) -> torch.nn.Parameter:
        found = stands_for(weight, bits if weight.shape[1] % 32 == 0 else 8)
        assert 0 < apart(found, weight) < 0.2
        return torch.nn.Parameter(found)

    model.lm_head.weight = rounded(model.lm_head.weight.data)  # apart from the embedding, which stays whole
    for name, layer in linear_layers(model).items():
        assert isinstance(layer, torch.nn.Linear), name
        layer.weight = rounded(layer.weight.data)
    wanted = logits_of(model, IDS)
    assert apart(decoder.start(IDS[:9]), wanted[8]) < 4e-2  # few rows, rounded to bf16: packed products
    assert apart(decoder.step([IDS[9]])[0], wanted[9]) < 4e-2
    long = IDS * 10
    assert apart(decoder.start(long), logits_of(model, long)[-1]) < 4e-2  # many rows: unpacked, but for the head's one


def rows_read(decoder: CachedDecoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the length of each part of a prompt that is computed."""
    read: list[int] = []
    right = decoder._read_chunk  # pyright: ignore[reportPrivateUsage]

    def counted(ids: Sequence[int], slot: int) -> torch.Tensor:
        read.append(len(ids))
        return right(ids, slot)

    monkeypatch.setattr(decoder, "_read_chunk", counted)
    return read


def test_what_a_slot_holds_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "qwen2")
    decoder, fresh = opened(folder), opened(folder)
    read = rows_read(decoder, monkeypatch)
    decoder.start(IDS[:6])
    decoder.step([IDS[6]])
    assert apart(decoder.start(IDS), fresh.start(IDS)) < 1e-5
    assert read == [6, len(IDS) - 7]
    other = [*IDS[:4], 9, 9, 9]
    assert apart(decoder.start(other), opened(folder).start(other)) < 1e-5
    assert read[2:] == [3]
    assert apart(decoder.start(other), opened(folder).start(other)) < 1e-5  # the same again: only the last row
    assert read[3:] == [1]


def test_a_beginning_is_taken_over_from_another_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, "llama")
    decoder = opened(folder, slots=3)
    decoder.start(IDS, 0)
    decoder.start([1, 2, 3], 2)
    read = rows_read(decoder, monkeypatch)
    other = [*IDS[:8], 77, 78]
    assert apart(decoder.start(other, 2), opened(folder).start(other)) < 1e-5
    assert read == [2]
    assert apart(decoder.step([4, 4, 4])[0], opened(folder).start([*IDS, 4])) < 1e-5  # the first one kept its own


@pytest.mark.parametrize("slots", [1, 2, 3, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_many_answers_are_those_of_one_at_a_time(slots: int, temperature: float, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "qwen3")
    prompts = [[*IDS[: 1 + 7 * number % 11], number] for number in range(9)]
    decodings = [
        Decoding(max_new_tokens=1 + 5 * (number % 4), temperature=temperature, seed=number) for number in range(9)
    ]
    alone = [list(generate(opened(folder), p, d, NEVER)) for p, d in zip(prompts, decodings, strict=True)]
    stops = frozenset({alone[3][2], alone[6][0]})
    wanted = [list(generate(opened(folder), p, d, stops)) for p, d in zip(prompts, decodings, strict=True)]
    assert wanted != alone
    found = dict(generate_many(opened(folder, slots=slots), prompts, decodings, stops))
    assert [found[number] for number in range(9)] == wanted


def test_context_ends(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "qwen2")
    decoder = opened(folder)
    decoder.start([1] * 256)
    with pytest.raises(ValueError, match="257 tokens"):
        decoder.step([1])


@pytest.mark.parametrize(("kind", "bits"), [("gpt2", None), ("vaultgemma", None), ("vaultgemma", 8), ("vaultgemma", 4)])
def test_other_models_are_answered_by_their_modules(
    kind: str, bits: int | None, tmp_path: Path, reported: Callable[[], list[str]]
) -> None:
    lively_model(kind).save_pretrained(tmp_path / "model")
    decoder: Decoder = load_decoder(tmp_path / "model", None, bits, FP32, str(tmp_path / "cache"), 4)
    assert isinstance(decoder, ModulesDecoder)
    assert decoder.slots == 1
    assert kind in reported()[0]
    first = decoder.start(IDS[:5])
    assert apart(first, logits_of(decoder.model, IDS[:5])[-1]) < 1e-4
    decoder.step([IDS[5]])
    assert apart(decoder.start(IDS), logits_of(decoder.model, IDS)[-1]) < 1e-4  # goes on
    assert apart(decoder.start(IDS[:5]), first) < 1e-5  # begins anew


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_was_broken_off_is_read_anew(
    kind: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(kind)
    model.save_pretrained(tmp_path / "model")
    decoder = load_decoder(tmp_path / "model", None, None, FP32, None, 1)
    decoder.start(IDS[:4])
    right = torch.nn.functional.scaled_dot_product_attention
    calls: list[int] = []

    def broken_off(*arguments: Any, **settings: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == layer + 1:
            raise KeyboardInterrupt
        return right(*arguments, **settings)

    with monkeypatch.context() as context:
        context.setattr(torch.nn.functional, "scaled_dot_product_attention", broken_off)
        with pytest.raises(KeyboardInterrupt):
            decoder.start(IDS[:9])
    assert apart(decoder.start(IDS), logits_of(model, IDS)[-1]) < 1e-4
    with monkeypatch.context() as context:
        calls.clear()
        context.setattr(torch.nn.functional, "scaled_dot_product_attention", broken_off)
        with pytest.raises(KeyboardInterrupt):
            decoder.step([8])
    assert apart(decoder.start([*IDS, 9, 9]), logits_of(model, [*IDS, 9, 9])[-1]) < 1e-4


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, "qwen2")
    decoder = opened(folder, hardware=Hardware(torch.device("cpu"), torch.bfloat16, ""))
    assert apart(decoder.start(IDS).float(), logits_of(model, IDS)[-1]) < 0.05


@pytest.mark.skipif(not has_int8_units(torch.device("cpu")), reason="needs int8 units")
def test_int8_units_are_near(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, "qwen2")
    assert 1e-4 < apart(opened(folder, bits=8).start(IDS), logits_of(model, IDS)[-1]) < 0.1


KINDS_OF_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "layers_to_transform": [1]},
    "own head": {"modules_to_save": ["lm_head"]},
    "own embedding and norm": {"modules_to_save": ["embed_tokens", "model.norm"]},
    "own layer": {"lora_target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp.up_proj"]},
}


@pytest.mark.parametrize("name", ["own head", "own embedding and norm"])
def test_a_head_of_its_own_stays_where_the_config_does_not_say_so(name: str, tmp_path: Path, data_file: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del settings["tie_word_embeddings"]  # as older versions of Transformers left out what is a class's default
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    adapter = tmp_path / "adapter"
    train(adapter, folder, data_file, max_steps=3, learning_rate=0.05, **LORA, **KINDS_OF_ADAPTERS[name])
    model = load_model(folder, torch.float32)
    load_adapter(model, adapter)
    wanted = logits_of(model.eval(), IDS)[-1]
    assert apart(opened(folder, adapter).start(IDS), wanted) < 1e-4
    merge(MergeConfig(lora_model=str(adapter), output_dir=str(tmp_path / "merged")))
    assert apart(logits_of(load_model(tmp_path / "merged", torch.float32), IDS)[-1], wanted) < 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("name", KINDS_OF_ADAPTERS)
def test_every_kind_of_adapter_answers_and_merges(name: str, kind: str, tmp_path: Path, data_file: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    adapter = tmp_path / "adapter"
    train(adapter, folder, data_file, max_steps=3, learning_rate=0.05, **LORA, **KINDS_OF_ADAPTERS[name])
    model = load_model(folder, torch.float32)
    before = logits_of(model, IDS)[-1]
    load_adapter(model, adapter)
    wanted = logits_of(model.eval(), IDS)[-1]
    assert apart(before, wanted) > 1e-3
    assert apart(opened(folder, adapter).start(IDS), wanted) < 1e-4
    merge(MergeConfig(lora_model=str(adapter), output_dir=str(tmp_path / "merged")))
    merged = load_model(tmp_path / "merged", torch.float32)
    assert apart(logits_of(merged, IDS)[-1], wanted) < 1e-4
    unties = kind == "qwen2" and ("head" in name or "embedding" in name)
    assert merged.config.tie_word_embeddings is (kind == "qwen2" and not unties)
    assert apart(opened(tmp_path / "merged").start(IDS), wanted) < 1e-4
