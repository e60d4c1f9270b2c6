"""How fast this machine could train at best: the rate of its matrix products over the work of a token.

python benchmarks/roofline.py prints the rate, in FLOP/s, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROWS = 1024  # tokens of a pass
SECONDS = 3.0


@dataclass(frozen=True)
class Shape:
    """What the work of a token depends on; parameters are counted, not bytes."""

    body: int
    head: int
    adapters: int
    attention_width: int
    layers: int


def shape_of(folder: Path, rank: int) -> Shape:
    """The shape of a Qwen2, Qwen3 or Llama model with adapters on all linear layers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layers = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers += [(hidden, inner), (hidden, inner), (inner, hidden)]
    count = config["num_hidden_layers"]
    return Shape(
        body=count * sum(a * b for a, b in layers),
        head=hidden * config["vocab_size"],
        adapters=count * rank * sum(a + b for a, b in layers),
        attention_width=queries,
        layers=count,
    )


def flops_per_token(shape: Shape, trained_share: float, mean_length: float, *, full: bool) -> float:
    """Multiplications and additions that training one token cannot do without, without recomputation.

    LoRA: forward and input gradient through frozen weights (2 + 2 a weight), those and the weight gradient through
    adapters (6), the head for trained tokens only, attention over the half of the scores that is not masked (forward
    two products, backward four). Full training: 6 a weight.
    """
    attention = shape.layers * 6 * 2 * shape.attention_width * mean_length / 2
    a_weight = 6 if full else 4
    adapters = 0 if full else 6 * shape.adapters
    return a_weight * (shape.body + trained_share * shape.head) + adapters + attention


def gemm_rate() -> float:
    """FLOP/s of bf16 products in the shapes and layouts that a 0.5B model trains with, median over a few seconds."""
    import torch

    products = []
    for out, into in ((4864, 896), (896, 4864), (896, 896)):
        x, y = (torch.randn(ROWS, width).to(torch.bfloat16) for width in (into, out))
        weight = torch.randn(out, into).to(torch.bfloat16)
        products += [(x, weight.t()), (y, weight)]
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)
    times: list[float] = []
    outs = [torch.empty(a.shape[0], b.shape[1], dtype=a.dtype) for a, b in products]
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        began = time.perf_counter()
        for (a, b), out in zip(products, outs, strict=True):
            torch.mm(a, b, out=out)
        times.append(time.perf_counter() - began)
    return flops / median(times)


if __name__ == "__main__":
    json.dump({"flops_per_second": gemm_rate()}, sys.stdout)
