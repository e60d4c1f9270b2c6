"""Which learning rates the defaults should be: each method at several, as `qingtune compare` measures them.

python benchmarks/learning_rates.py --model NAME --output FOLDER [--chinese] [--seeds 2] [--max_steps 66]
    [--methods full lora ...] [--rates 1e-4,2e-4] [--alphas 128]
compares each method's learning rates, and for adapters of rank 64 alpha 16 against 128, on the bundled English or
Chinese data, and prints a Markdown table of the evaluation losses. Trials that the folder holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import workload  # noqa: F401  puts the clone on the path

from qingtune.cli import main as qingtune
from qingtune.data.prompts import bundled_data

RATES = {
    "full": "1e-5,2e-5,5e-5,1e-4,2e-4",
    "lora": "1e-4,2e-4,4e-4,8e-4",
    "qlora4": "1e-4,2e-4,4e-4,8e-4",
    "qlora8": "1e-4,2e-4,4e-4,8e-4",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a .gguf file or a name on a hub")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparisons, one a method")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--chinese", action="store_true", help="train and evaluate on the Chinese data")
    parser.add_argument("--rates", help="instead of each method's own")
    parser.add_argument("--alphas", default="16,128")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=66)
    arguments = parser.parse_args()
    for method in arguments.methods:
        if code := _compare(method, arguments):
            return code
    _print_table([arguments.output / method for method in arguments.methods])
    return 0


def _compare(method: str, arguments: argparse.Namespace) -> int:
    names = ("xhs_sft_samples", "xhs_heldout") if arguments.chinese else ("posts_en_samples", "posts_en_heldout")
    train, held_out = (bundled_data() / f"store_{name}.jsonl" for name in names)
    flags: dict[str, Any] = {
        "model_name_or_path": arguments.model,
        "data_path": train,
        "eval_data_path": held_out,
        "output_dir": arguments.output / method,
        "methods": method,
        "seeds": arguments.seeds,
        "max_steps": arguments.max_steps,
        "lora_r": 64,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    grid = [f"learning_rate={arguments.rates or RATES[method]}"]
    if method != "full":
        grid.append(f"lora_alpha={arguments.alphas}")
    return qingtune(["compare", *words, "--grid", *grid])


def _print_table(folders: list[Path]) -> None:
    print("| method | learning rate | alpha | eval_loss before | after | range over seeds |\n|---|---|---|---|---|---|")
    for folder in folders:
        for setup in json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["setups"]:
            if "eval_loss" in setup:
                alpha, loss = setup["varied"].get("lora_alpha"), setup["eval_loss"]
                print(
                    f"| {setup['method']} | {setup['learning_rate']:g} | {f'{alpha:g}' if alpha else '-'} "
                    f"| {setup['eval_loss_before']['median']:.4f} | {loss['median']:.4f} "
                    f"| {loss['least']:.4f} - {loss['most']:.4f} |"
                )


if __name__ == "__main__":
    sys.exit(main())
