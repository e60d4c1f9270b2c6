"""Training speed and memory, ours and the peers', side by side in one run.

python benchmarks/train.py [--shape NAME ... | --model FOLDER] [--systems NAME ...] [--repeats 3]
    [--without avx512_bf16,amx_bf16] [--output FILE.json]

Every system trains LoRA r = 64 on all linear layers (or QLoRA, or all weights) on the same samples in the same order,
8 a step, in a process of its own; systems take turns, so that a machine that slows down slows all of them. The first
step of a process warms up and is not timed. All compute in bf16, or in fp32 on a CPU without units for bf16. Shares
are of what the machine's matrix products in that dtype, timed next to each run, would allow (roofline.py). Tokens
count once even where a beginning that samples share is computed once. --without stands in for a CPU with fewer units.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lesser_cpu import environment_without
from peers.environments import make_environment
from roofline import flops_per_token, work_of
from workload import (
    DATA,
    DEFAULT_SHAPE,
    MAX_LENGTH,
    SEED,
    SHAPES,
    SYSTEM_PROMPT,
    cache_folder,
    model_folder,
    write_rows,
)

from qingtune.machine.resources import cpu_has_bf16
from qingtune.runs.measures import tokens_per_second

HERE = Path(__file__).parent
ROOT = HERE.parent
RANK = 64
SAMPLES_PER_STEP = 8
OURS = {
    "LoRA": ["--use_lora"],
    "QLoRA 4-bit": ["--use_qlora", "--quantization_bit", "4"],
    "QLoRA 8-bit": ["--use_qlora", "--quantization_bit", "8"],
    "full": [],
    "full, 8-bit AdamW": ["--optim", "adamw_8bit"],
}
PEERS = {  # name -> environment, script, bits of the base
    "TRL": ("trl", "run_trl.py", None),
    "LLaMA-Factory": ("llamafactory", "run_llamafactory.py", None),
    "ms-swift": ("ms-swift", "run_ms_swift.py", None),
    "TRL 4-bit": ("trl", "run_trl.py", 4),
    "TRL 8-bit": ("trl", "run_trl.py", 8),
}


@dataclass
class Run:
    """One process: its rate without the first step, the machine's, and what else was seen."""

    system: str
    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int
    first_loss: float
    first_step_after_s: float
    settings: str


def main() -> None:
    arguments = _arguments()
    os.environ |= environment_without(arguments.without)
    for shape in [DEFAULT_SHAPE] if arguments.model else arguments.shape:
        model = model_folder(arguments.model, shape)
        print(f"\n{arguments.model or shape}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="qingtune-bench-") as scratch:
            compare(model, arguments, Path(scratch))


def compare(model: Path, arguments: argparse.Namespace, scratch: Path) -> None:
    """Run all systems in turn on a model and print the table."""
    dtype = "bf16" if cpu_has_bf16() else "fp32"
    most = max(arguments.steps, arguments.peer_steps)
    facts = write_rows(model, scratch / "rows.jsonl", most * SAMPLES_PER_STEP, SAMPLES_PER_STEP)
    pythons = {
        name: make_environment(PEERS[name][0], cache_folder() / "bench-envs")
        for name in arguments.systems
        if name in PEERS
    }
    for name, python in pythons.items():
        if isinstance(python, str):
            _say(f"{name}: skipped, {python}")
    runs: list[Run] = []
    started = time.perf_counter()
    for repeat in range(arguments.repeats):
        for system in arguments.systems:
            if isinstance(pythons.get(system), str):
                continue
            rate = _gemm_rate(dtype)
            began = time.perf_counter()
            result = (
                _run_ours(system, model, scratch, arguments.steps)
                if system in OURS
                else _run_peer(system, pythons[system], model, scratch, arguments.peer_steps, dtype)
            )
            if result is None:
                continue
            rate = (rate + _gemm_rate(dtype)) / 2
            speed = tokens_per_second(result["tokens"], result["seconds"]) or math.nan
            seen = [result[name] for name in ("first_step_after_s", "settings")]
            runs.append(Run(system, speed, rate, result["peak_bytes"], result["losses"][0], *seen))
            _say(
                f"{repeat + 1}/{arguments.repeats} {system}: {speed:.1f} tokens/s, {runs[-1].peak_bytes / 1e9:.2f} GB, "
                f"products at {rate / 1e9:.0f} GFLOP/s ({time.perf_counter() - began:.0f} s)"
            )
            if arguments.output:
                _write(Path(arguments.output), model, runs, facts)
        if more := arguments.repeats - repeat - 1:
            round_minutes = (time.perf_counter() - started) / 60 / (repeat + 1)
            _say(f"A round takes {round_minutes:.0f} min; {more} more, {more * round_minutes:.0f} min.")
    print(table(runs, work_of(model, RANK), facts), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Transformers folder; default: random weights of --shape")
    parser.add_argument(
        "--shape",
        nargs="+",
        default=[DEFAULT_SHAPE],
        choices=list(SHAPES),
        help="models' published shapes",
        metavar="NAME",
    )
    parser.add_argument("--systems", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of our runs, the first one not timed")
    parser.add_argument("--peer_steps", type=int, default=2, help="the same of the peers' runs")
    parser.add_argument("--without", default="", help="flags of /proc/cpuinfo, separated by commas, to leave unused")
    parser.add_argument("--output", help="where all runs are written as JSON")
    return parser.parse_args()


def _run_ours(system: str, model: Path, scratch: Path, steps: int) -> dict[str, Any] | None:
    """Our command as a user types it."""
    output = scratch / f"output-{time.time_ns()}"
    command = [
        sys.executable, "-m", "qingtune", "train", "--model_name_or_path", str(model), "--data_path", str(DATA),
        "--output_dir", str(output), "--per_device_train_batch_size", str(SAMPLES_PER_STEP), "--max_steps", str(steps),
        "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--learning_rate", "1e-4",
        "--lr_scheduler_type", "constant", "--seed", str(SEED), "--max_seq_length", str(MAX_LENGTH),
        "--system_prompt", SYSTEM_PROMPT, "--lora_r", str(RANK), "--lora_alpha", "16", "--lora_dropout", "0",
        "--gradient_checkpointing", "false", *OURS[system],
    ]  # fmt: skip
    began = time.perf_counter()
    first_step_after = 0.0
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    lines: list[str] = []
    for line in process.stderr or ():
        lines.append(line)
        if line.startswith("step 1/"):
            first_step_after = time.perf_counter() - began
    if process.wait():
        _say(f"{system}: failed\n{''.join(lines[-20:])}")
        return None
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(output)  # a whole model after full training
    steps_seen = [row for row in rows if "loss" in row]
    return {
        "tokens": [row["tokens"] for row in steps_seen],
        "seconds": [row["seconds"] for row in steps_seen],
        "losses": [row["loss"] for row in steps_seen],
        "peak_bytes": steps_seen[-1]["peak_bytes"],
        "first_step_after_s": first_step_after,
        "settings": f"batch {SAMPLES_PER_STEP}",
    }


def _run_peer(
    system: str, python: Path | str, model: Path, scratch: Path, steps: int, dtype: str
) -> dict[str, Any] | None:
    _, script, bits = PEERS[system]
    workload, result = scratch / "workload.json", scratch / "result.json"
    content = {
        "model": str(model), "rows": str(scratch / "rows.jsonl"), "steps": steps, "samples_per_step": SAMPLES_PER_STEP,
        "lora_r": RANK, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": 1e-4, "max_length": MAX_LENGTH,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)), "quantization_bit": bits,
        "dtype": dtype,
    }  # fmt: skip
    workload.write_text(json.dumps(content), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [str(python), str(HERE / "peers" / script), str(workload), str(result)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not result.exists():
        _say(f"{system}: failed\n{done.stdout[-2000:]}")
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def _gemm_rate(dtype: str) -> float:
    done = subprocess.run(
        [sys.executable, str(HERE / "roofline.py"), dtype], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)["flops_per_second"]


def table(runs: list[Run], shape: Any, facts: dict[str, float]) -> str:
    """All systems' medians as Markdown, with the least and most seen."""
    lines = [
        f"{_machine()}; {facts['mean_length']:.0f} tokens a sample, {facts['trained_share']:.0%} trained",
        "",
        "| system | tokens/s | share of the roofline | peak memory | first loss | first step after | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in dict.fromkeys(run.system for run in runs):
        mine = [run for run in runs if run.system == system]
        work = flops_per_token(shape, facts["trained_share"], facts["mean_length"], full=system.startswith("full"))
        cells = [
            f"{'' if system in PEERS else 'qingtune '}{system}",
            _spread([run.tokens_per_second for run in mine], ".0f"),
            _spread([run.tokens_per_second * work / run.flops_per_second for run in mine], ".2f"),
            f"{max(run.peak_bytes for run in mine) / 1e9:.2f} GB",
            f"{mine[0].first_loss:.4f}",
            f"{median(run.first_step_after_s for run in mine):.0f} s",
            mine[0].settings,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_ratios(runs)])


def _ratios(runs: list[Run]) -> Iterable[str]:
    rate = {s: median(r.tokens_per_second for r in runs if r.system == s) for s in {r.system for r in runs}}
    peers = {name: value for name, value in rate.items() if name in PEERS and PEERS[name][2] is None}
    if "LoRA" not in rate:
        return
    if peers:
        best = max(peers, key=lambda name: peers[name])
        yield f"LoRA is {rate['LoRA'] / peers[best]:.2f} times as fast as {best}, the best peer."
    for name in ("QLoRA 4-bit", "QLoRA 8-bit"):
        if name in rate:
            yield f"{name} runs at {rate[name] / rate['LoRA']:.2f} of LoRA's speed."


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def _write(path: Path, model: Path, runs: list[Run], facts: dict[str, float]) -> None:
    """Keep what was seen of a model in the file, next to the other models'."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content[model.name] = {"machine": _machine(), "facts": facts, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
