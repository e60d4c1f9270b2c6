"""What a LoRA step costs as samples get longer, batches larger and ranks higher; each setting in a process of its own.

python benchmarks/scaling.py [--model FOLDER] prints a Markdown table. Samples are random tokens, 60 % of them trained;
the first of three steps warms up and is not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from workload import model_folder

from qingtune.runs.measures import tokens_per_second

STEPS = 3
TRAINED_SHARE = 0.6
# Tokens a sample, samples a step, rank.
SETTINGS = [
    *((length, 1, 64) for length in (256, 512, 1024, 2048, 4096)),
    *((326, batch, 64) for batch in (1, 2, 4, 8, 16)),
    *((326, 8, rank) for rank in (8, 16, 128)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Transformers folder; default: random weights of Qwen2.5-0.5B's shape")
    parser.add_argument("--one", nargs=3, type=int, metavar=("LENGTH", "BATCH", "RANK"), help="measure one, as JSON")
    arguments = parser.parse_args()
    model = model_folder(arguments.model)
    if arguments.one:
        print(json.dumps(measure(model, *arguments.one)))
        return
    print("| tokens a sample | samples a step | rank | tokens/s | peak memory | layers computed again |")
    print("|---|---|---|---|---|---|")
    for setting in SETTINGS:
        command = [sys.executable, __file__, "--model", str(model), "--one", *map(str, setting)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [*map(str, setting), f"{found['rate']:.0f}", f"{found['peak'] / 1e9:.2f} GB", str(found["recompute"])]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure(folder: Path, length: int, batch: int, rank: int) -> dict[str, float]:
    """Tokens/s and peak bytes of a few steps, and of how many layers activations were computed again."""
    import numpy as np
    import torch

    from qingtune.adapters.lora import add_lora
    from qingtune.config.training import TrainConfig
    from qingtune.data.batch import collate, split_evenly
    from qingtune.data.tokenize import Sample
    from qingtune.kernels.device import choose_hardware, peak_bytes
    from qingtune.models.base import load_base
    from qingtune.training.engine import make_engine

    hardware = choose_hardware()
    model = load_base(folder, hardware.dtype, None, hardware.device, None)
    add_lora(model, None, r=rank, alpha=16, dropout=0.0)
    engine = make_engine(TrainConfig(use_lora=True, lora_r=rank), model, hardware, length)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    random = np.random.default_rng(0)
    trained = np.arange(length) >= (1 - TRAINED_SHARE) * length
    seconds: list[float] = []
    for _ in range(STEPS):
        samples = [Sample(random.integers(0, 5000, length).astype(np.int32), trained, "") for _ in range(batch)]
        began = time.perf_counter()
        for group in split_evenly(samples, engine.most_tokens):
            engine.add_gradients(collate(group), torch.tensor(1.0 / (length * batch)))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - began)
    decoder = getattr(engine.add_gradients, "__self__")  # noqa: B009
    rate = tokens_per_second([length * batch] * STEPS, seconds)
    return {"rate": rate, "peak": peak_bytes(hardware.device), "recompute": decoder.recompute}


if __name__ == "__main__":
    main()
