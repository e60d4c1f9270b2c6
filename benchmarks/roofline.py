"""How fast this machine could train at best: the rate of its matrix products over the work of a token.

python benchmarks/roofline.py prints the rate, in FLOP/s, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a clone is used as it is, without being installed

from qingtune.models.find import read_model_config
from qingtune.models.shape import shape_of_config
from qingtune.planning.speed import TokenWork, flops_per_token

__all__ = ["flops_per_token", "gemm_rate", "shape_of"]
SECONDS = 3.0


def shape_of(folder: Path, rank: int) -> TokenWork:
    """The work of a token in a model with adapters on all linear layers."""
    shape = shape_of_config(read_model_config(folder), str(folder))
    return TokenWork(
        body=sum(module.shape[0] * module.shape[1] for module in shape.linear),
        head=shape.hidden * shape.vocabulary,
        adapters=rank * sum(sum(module.shape) for module in shape.linear),
        attention_width=shape.heads * shape.head_size,
        layers=shape.layers,
    )


def gemm_rate() -> float:
    """FLOP/s of bf16 products in the shapes and layouts that a 0.5B model trains with, median over a few seconds."""
    import torch

    from qingtune.planning.calibrate import product_rate

    return product_rate(torch.device("cpu"), torch.bfloat16, SECONDS)


if __name__ == "__main__":
    json.dump({"flops_per_second": gemm_rate()}, sys.stdout)
