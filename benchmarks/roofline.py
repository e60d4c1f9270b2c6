"""How fast this machine could train at best: the rate of its matrix products over the work of a token.

python benchmarks/roofline.py [bf16 | fp32] prints the rate, in FLOP/s, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

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
        attention_layers=blueprint.attention_layers,
    )


def gemm_rate(dtype: str) -> float:
    """FLOP/s of products in the shapes and layouts that a 0.5B model trains with, median over a few seconds.

    In fp32 the better of two libraries: MKL, and oneDNN with weights in its own layout.
    """
    import torch

    from qingtune.planning.calibrate import product_rate

    if dtype == "bf16":
        return product_rate(torch.device("cpu"), torch.bfloat16, SECONDS)
    return max(product_rate(torch.device("cpu"), torch.float32, SECONDS), _onednn_rate())


def _onednn_rate() -> float:
    import torch

    from qingtune.planning.calibrate import ROWS, SHAPES

    wide = [width for shape in SHAPES for width in (shape, shape[::-1])]  # forward, and the input's gradient
    inputs = [torch.randn(ROWS, into) for _, into in wide]
    weights = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(shape), ROWS) for shape in wide]
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS or len(times) < 3:
        began = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        times.append(time.perf_counter() - began)
    return sum(2 * ROWS * out * into for out, into in wide) / median(times)


if __name__ == "__main__":
    json.dump({"flops_per_second": gemm_rate(sys.argv[1] if len(sys.argv) > 1 else "bf16")}, sys.stdout)
