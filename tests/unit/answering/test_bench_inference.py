"""benchmarks/inference.py counts what it divides by, for families whose layers are of several kinds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_model

from qingtune.answering.load import load_decoder
from qingtune.kernels.device import Hardware

LAYERS = ["linear_attention", "full_attention"]
SIZES = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": LAYERS, "num_hidden_layers": 2, "hidden_size": 32, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("inference")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(ROOT / "benchmarks"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "sizes"), [("qwen3_5_text", {"intermediate_size": 64}), ("qwen3_5_moe_text", EXPERTS)]
)
def test_bytes_that_a_token_reads(inference: Any, kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(kind, **SIZES, **sizes)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, None, None, Hardware(torch.device("cpu"), torch.float32, ""), None, 1)
    wanted = model.lm_head.weight.numel()
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() == 3 and "experts" in name:  # of which a token reads those that it chooses
            wanted += parameter.numel() * EXPERTS["num_experts_per_tok"] // EXPERTS["num_experts"]
        elif parameter.dim() == 2:
            wanted += parameter.numel()
    assert inference._held_bytes(decoder) == 4 * wanted
    seen = {"decode": 2.0, "prefill": 8.0, "held_bytes": 50, "peak_bytes": 5e8, "load_s": 1.0, "dtype": "float32"}
    table = inference.table({"bf16": [{**seen, "read": 1000.0, "flops": 1e9}]}, tmp_path)
    assert "| qingtune bf16 | 2.0 (2.0-2.0) | 0.10 (0.10-0.10) | 8 (8-8) |" in table
