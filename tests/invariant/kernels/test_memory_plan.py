"""The bytes planned for the fast kernels' buffers are those that a pass makes, name by name; with the elementwise work
in C, which needs fewer, they are the most that it makes."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from decoders import NEWER, OLDER, make_decodable, random_sample

from qingtune.adapters.lora import member
from qingtune.data.batch import collate
from qingtune.kernels.buffers import Arithmetic, Buffers, buffers
from qingtune.kernels.decoder import TrainingDecoder
from qingtune.kernels.footprint import PassTokens
from qingtune.kernels.native import attention, int8_products, low_rank, products
from qingtune.kernels.native import delta as delta_in_c
from qingtune.kernels.native import delta_rule as delta_rule_in_c
from qingtune.kernels.native import elementwise as in_c

LENGTH, SAMPLES = 40, 2
LONGER = 136  # the sample that is evaluated
METHODS: dict[str, tuple[str, int | None, float]] = {
    "full": ("full", None, 0.0),
    "lora": ("lora", None, 0.0),
    "lora, weights as stored": ("lora", None, 0.0),
    "lora, dropout": ("lora", None, 0.25),
    "dora": ("dora", None, 0.0),
    "qlora 4": ("lora", 4, 0.0),
    "qlora 8": ("lora", 8, 0.0),
    "dora on 8 bits": ("dora", 8, 0.0),
}
EVEN_RANKS: dict[str, tuple[str, int | None, float]] = {
    "lora, even ranks": ("lora", None, 0.0),
    "lora, dropout, even ranks": ("lora", None, 0.25),
    "dora on 8 bits, even ranks": ("dora", 8, 0.0),
}
_NAMES = [
    (r"layer\d+\.input", "layer.input"),
    (r"layer\d+\..*", "layer.kept"),
]


def held(decoder: TrainingDecoder) -> Buffers:
    """What the workspace holds, layers taken together as the plan takes them."""
    found: Buffers = {}
    for (name, dtype), buffer in decoder.workspace._held.items():
        group = next((group for pattern, group in _NAMES if re.fullmatch(pattern, name)), name)
        size = buffer.numel() * buffer.element_size()
        found[group, dtype.itemsize] = found.get((group, dtype.itemsize), 0) + size
    return {key: size for key, size in found.items() if size}


@pytest.mark.parametrize(
    ("kind", "method", "compiled"),
    [
        *itertools.product(OLDER, METHODS, [False]),
        *itertools.product(["qwen2"], EVEN_RANKS, [False]),
        *itertools.product(["qwen3"], METHODS, [True]),
        *itertools.product(NEWER, ["full", "lora, dropout", "dora", "qlora 4", "qlora 8"], [False]),
    ],
)
def test_every_buffer_has_its_planned_size(
    kind: str, method: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(in_c, "elementwise", lambda: None)
        monkeypatch.setattr(delta_in_c, "compiled", lambda: None)
        monkeypatch.setattr(delta_rule_in_c, "compiled", lambda: None)
        monkeypatch.setattr(int8_products, "_library", lambda: None)
    trained, bits, dropout = (METHODS | EVEN_RANKS)[method]
    for dtype, recompute, evaluates in itertools.product((torch.float32, torch.bfloat16), (0, 1, 2), (False, True)):
        model: Any = make_decodable(kind, trained, bits=bits, rank=4 if method in EVEN_RANKS else 3)
        if trained != "full":
            for parameter in model.parameters():
                kept = torch.bfloat16 if method.endswith("as stored") else dtype
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(kept)
        decoder = TrainingDecoder(model, dtype, member, recompute=recompute, dropout=dropout, int8_units=bits == 8)
        batch = collate([random_sample(LENGTH, seed) for seed in range(SAMPLES)])
        longer = collate([random_sample(LONGER, 9)])
        if evaluates:
            decoder.loss(longer)
        decoder.add_gradients(batch, torch.tensor(1.0))
        itemsize = model.get_input_embeddings().weight.dtype.itemsize
        how = Arithmetic(
            itemsize=dtype.itemsize,
            weight_itemsize=None if bits else itemsize,
            head_itemsize=itemsize,
            trains_weights=trained == "full",
            trains_head=trained == "full",
            reads_stored=products.reads_as_stored(dtype, torch.device("cpu")),
            low_rank_in_c=low_rank.native_low_rank(dtype, torch.device("cpu")) is not None,
            attention_in_c=attention.in_c(dtype, torch.device("cpu")),
            int8_units=bits == 8,
            int8_room=int8_products.room_bytes if int8_products.in_c() else None,
            dora=trained == "dora",
            dropout=dropout > 0,
            recompute=recompute,
            gradient_below=trained == "full",
        )
        work = PassTokens(SAMPLES * LENGTH, len(batch.targets), LENGTH)
        evaluation = PassTokens(LONGER, len(longer.targets), LONGER) if evaluates else None
        planned = buffers(decoder.sizes, how, work, evaluation)
        found = held(decoder)
        if compiled:
            assert all(size <= planned[key] for key, size in found.items()), (dtype, recompute, evaluates)
        else:
            assert planned == found, (dtype, recompute, evaluates)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "phi3"])
def test_every_buffer_has_its_planned_size_without_attention_in_c(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compiled", lambda: None)
    test_every_buffer_has_its_planned_size(kind, "full", False, monkeypatch)


@pytest.mark.parametrize("method", ["lora, weights as stored", "full"])
def test_every_buffer_has_its_planned_size_without_products_in_c(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_library", lambda: None)
    test_every_buffer_has_its_planned_size("qwen2", method, False, monkeypatch)


@pytest.mark.parametrize("method", EVEN_RANKS)
def test_every_buffer_has_its_planned_size_without_adapters_in_c(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "low_rank", lambda: None)
    test_every_buffer_has_its_planned_size("qwen2", method, False, monkeypatch)
