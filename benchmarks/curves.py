"""Whether the fast kernels learn what plain ones learn: the same LoRA run through each, its losses side by side.

python benchmarks/curves.py --model FOLDER --output FILE.json [--plot FILE.svg] trains on the bundled samples, one a
step, on each path in a process of its own, and evaluates on samples held out. Runs that the output file holds are not
made again.

plain  Transformers' modules under autograd, each sample alone, all its logits, fp32 loss; bf16
fp32   the same in fp32: what both bf16 paths should give but for rounding
fast   our kernels in bf16
int8   our kernels on int8 weights
nf4    our kernels on NF4 weights
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from workload import DATA, MAX_LENGTH, SEED, SYSTEM_PROMPT

RANK, ALPHA, LEARNING_RATE = 64, 16, 1e-4
HELD_OUT = 28
EVALUATED_AFTER = 100  # steps, and after the last one
PATHS = ("fast", "plain", "fp32", "int8", "nf4")
SMOOTHED_OVER = 10  # steps, in the plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Transformers folder")
    parser.add_argument("--output", type=Path, required=True, help="where losses are kept, as JSON")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["fast", "plain", "fp32"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="a picture of the curves")
    parser.add_argument("--one", choices=PATHS, help="make one run in this process and print it")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} holds no model (no config.json); --model names a Transformers folder")
    if arguments.one:
        print(json.dumps(_run(arguments.one, arguments.model, arguments.steps)))
        return
    runs = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    for path in arguments.paths:
        if len(runs.get(path, {}).get("losses", [])) == arguments.steps:
            continue
        command = [sys.executable, __file__, "--model", str(arguments.model), "--output", str(arguments.output)]
        command += ["--steps", str(arguments.steps), "--one", path]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[path] = json.loads(done.stdout.splitlines()[-1])
        arguments.output.write_text(json.dumps(runs), encoding="utf-8")
    _table(runs)
    if arguments.plot:
        _plot(runs, arguments.plot)


def _run(path: str, folder: Path, steps: int) -> dict[str, Any]:
    """Losses a trained token of each step, and of the held-out samples after some steps."""
    import torch

    from qingtune.adapters.lora import add_lora
    from qingtune.config.training import TrainConfig
    from qingtune.data.batch import collate
    from qingtune.kernels.device import choose_hardware
    from qingtune.models.base import load_base
    from qingtune.training.engine import make_engine

    hardware = choose_hardware()
    samples = _samples(folder)
    dtype = torch.float32 if path == "fp32" else torch.bfloat16
    model = load_base(folder, dtype, {"int8": 8, "nf4": 4}.get(path), hardware.device, None)
    torch.manual_seed(SEED)
    add_lora(model, None, r=RANK, alpha=ALPHA, dropout=0.0)
    if path in ("plain", "fp32"):
        loss, add_gradients = _plain(model)
    else:
        engine = make_engine(TrainConfig(use_lora=True, lora_r=RANK), model, hardware, MAX_LENGTH)
        loss, add_gradients = engine.loss, engine.add_gradients
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    held_out, trained = samples[:HELD_OUT], samples[HELD_OUT:]
    found: dict[str, Any] = {"losses": [], "evaluations": {}}
    for step in range(steps):
        if step == 0:
            found["evaluations"]["0"] = _evaluate(loss, held_out)
        batch = collate([trained[step % len(trained)]])
        count = len(batch.targets)
        found["losses"].append(float(add_gradients(batch, torch.tensor(1 / count))) / count)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step + 1 in (EVALUATED_AFTER, steps):
            found["evaluations"][str(step + 1)] = _evaluate(loss, held_out)
        if (step + 1) % 10 == 0:
            _say(f"{time.strftime('%H:%M:%S')} {path} step {step + 1}: {fmean(found['losses'][-10:]):.4f}")
    return found


def _samples(folder: Path) -> list[Any]:
    from qingtune.data.format import read_conversations
    from qingtune.data.tokenize import make_template, tokenize
    from qingtune.models.load import load_tokenizer, stop_ids

    template = make_template(load_tokenizer(folder), stop_ids(folder))
    conversations = read_conversations([str(DATA)], SYSTEM_PROMPT, "raise").conversations
    samples = tokenize(template, conversations, MAX_LENGTH, "raise").samples
    return [samples[int(place)] for place in np.random.default_rng(SEED).permutation(len(samples))]


def _plain(model: Any) -> tuple[Any, Any]:
    """Loss and gradient with nothing of ours but the adapters' layers."""
    import torch

    def summed(batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch.token_ids[None], use_cache=False).logits[0].float()
        return torch.nn.functional.cross_entropy(logits[batch.predicting], batch.targets, reduction="sum")

    def add_gradients(batch: Any, scale: torch.Tensor) -> torch.Tensor:
        total = summed(batch)
        (total * scale).backward()
        return total.detach()

    return torch.no_grad()(summed), add_gradients


def _evaluate(loss: Any, samples: list[Any]) -> float:
    from qingtune.data.batch import collate

    batches = [collate([sample]) for sample in samples]
    return sum(float(loss(batch)) for batch in batches) / sum(len(batch.targets) for batch in batches)


def _table(runs: dict[str, Any]) -> None:
    """Each path's evaluations, and how far its losses lie from the plain path's and from fp32."""
    steps = sorted({step for run in runs.values() for step in run["evaluations"]}, key=int)
    print("| path |", " | ".join(f"evaluation loss after {step}" for step in steps), end=" | ")
    print("mean (largest) distance of a step's loss from plain | from fp32 |")
    print("|---" * (len(steps) + 3) + "|")
    for path, run in runs.items():
        cells = [f"{run['evaluations'][step]:.4f}" if step in run["evaluations"] else "-" for step in steps]
        cells += [_distance(run, runs.get(other)) if other != path else "-" for other in ("plain", "fp32")]
        print(f"| {path} | {' | '.join(cells)} |")


def _distance(run: dict[str, Any], other: dict[str, Any] | None) -> str:
    if other is None:
        return "-"
    apart = [abs(a - b) for a, b in zip(run["losses"], other["losses"], strict=False)]
    return f"{fmean(apart):.4f} ({max(apart):.4f})"


def _plot(runs: dict[str, Any], target: Path) -> None:
    """Smoothed losses above, distances from the fp32 run (or the plain one) below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    window = np.ones(SMOOTHED_OVER) / SMOOTHED_OVER
    reference = "fp32" if "fp32" in runs else "plain"
    for path, run in runs.items():
        smooth = np.convolve(run["losses"], window, "valid")
        above.plot(np.arange(len(smooth)) + SMOOTHED_OVER, smooth, label=path, linewidth=1)
        if path != reference:
            shared = min(len(run["losses"]), len(runs[reference]["losses"]))
            apart = np.subtract(run["losses"][:shared], runs[reference]["losses"][:shared])
            below.plot(np.arange(shared) + 1, apart, label=f"{path} - {reference}", linewidth=0.8)
    above.set_ylabel(f"loss a trained token,\nmean of {SMOOTHED_OVER} steps")
    below.set_ylabel("distance of a step's loss")
    below.set_xlabel("step")
    above.legend()
    below.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
