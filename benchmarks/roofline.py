"""How fast this machine could train at best: the rate of its matrix products over the work of a token.

python benchmarks/roofline.py prints the rate, in FLOP/s, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a clone is used as it is, without being installed

from qingtune.config.training import TrainConfig
from qingtune.machine.resources import Machine
from qingtune.planning.blueprint import read_blueprint
from qingtune.planning.speed import TokenWork, flops_per_token

__all__ = ["flops_per_token", "gemm_rate", "work_of"]
SECONDS = 3.0


def work_of(folder: Path, rank: int) -> TokenWork:
    """The work of a token in a model with adapters of this rank on all linear layers; 0 for none."""
    blueprint, machine = read_blueprint(folder), Machine("cpu", "", 2, None, None)
    config = TrainConfig(use_lora=rank > 0, lora_r=rank or 1)
    return TokenWork(
        body=blueprint.active_body,
        head=blueprint.hidden * blueprint.vocabulary,
        adapters=blueprint.built(config, machine).low_rank,
        attention_width=blueprint.attention_width,
        layers=blueprint.layers,
    )


def gemm_rate() -> float:
    """FLOP/s of bf16 products in the shapes and layouts that a 0.5B model trains with, median over a few seconds."""
    import torch

    from qingtune.planning.calibrate import product_rate

    return product_rate(torch.device("cpu"), torch.bfloat16, SECONDS)


if __name__ == "__main__":
    json.dump({"flops_per_second": gemm_rate()}, sys.stdout)
