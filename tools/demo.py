"""`make demo`: get a model, fine-tune it on bundled data, and show answers before and after side by side.

Qwen2.5-0.5B-Instruct on the Chinese samples if this machine computes in 16 bits and a folder of the model is in models/
or a hub answers; else SmolLM2-135M on the English ones. A short trial measures how fast this machine trains; the run
then gets as many steps as fit into BUDGET_S, installation included. A second call resumes it or shows its answers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fetch_smollm2 import fetch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from qingtune.commands.train import train  # noqa: E402
from qingtune.config.load import load_train_config  # noqa: E402
from qingtune.config.training import DEFAULT_MODEL, TrainConfig  # noqa: E402
from qingtune.data.prompts import rows_with_prompts  # noqa: E402
from qingtune.errors import UserError  # noqa: E402
from qingtune.machine.resources import find_machine  # noqa: E402
from qingtune.models.find import find_model  # noqa: E402
from qingtune.output.invocation import command_line  # noqa: E402
from qingtune.planning.of_run import measured_speed  # noqa: E402
from qingtune.runs.record import METRICS, SAMPLES, SETTINGS  # noqa: E402
from qingtune.training.sample_answers import MOST_TOKENS  # noqa: E402

BUDGET_S = 480.0
RESERVE_S = 30.0  # for writing the result, the page, and a machine that slows down
TRIAL_STEPS = 5
FEWEST_STEPS = 20  # with fewer, answers hardly change
MOST_STEPS = 66  # two passes over the English samples
SHOWN = 2
# One answered token takes as long as at most this many trained ones. An evaluated token: as a third of one.
ANSWERED_TOKEN, EVALUATED_TOKEN = 25, 1 / 3
EVALUATIONS, EVALUATED_ROWS, ROWS_A_STEP = 2, 30, 4  # before the first step and after the last


@dataclass(frozen=True)
class Trial:
    """What a run of a few steps took.

    Attributes:
        startup_s: seconds of the run outside of its steps.
        step_tokens: tokens of one step.
        tokens_per_second: after the first step.
    """

    startup_s: float
    step_tokens: float
    tokens_per_second: float

    def seconds(self, steps: int, shown: int) -> float:
        """A run's expected duration, with answers to so many prompts before and after it."""
        evaluated = EVALUATIONS * EVALUATED_ROWS * self.step_tokens / ROWS_A_STEP
        tokens = (
            steps * self.step_tokens + EVALUATIONS * shown * MOST_TOKENS * ANSWERED_TOKEN + evaluated * EVALUATED_TOKEN
        )
        return self.startup_s + tokens / self.tokens_per_second

    def steps_within(self, seconds: float, shown: int) -> int:
        """Steps of a run that ends in time, at most MOST_STEPS; below 0 if its answers alone take longer."""
        left = seconds - self.seconds(0, shown)
        return min(MOST_STEPS, int(left * self.tokens_per_second / self.step_tokens))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo in the repository's root."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, default=time.time(), help="when the installation began, Unix time")
    started: float = parser.parse_args(argv).started
    try:
        config = _configure(started)
        if not train(config, command="make demo"):
            return 130
        _show(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as ended:
        _say(
            str(ended) or "Interrupted. A fetched model and saved checkpoints are kept; make demo continues with them."
        )
        return 130
    chat = command_line("chat", base_model=config.model_name_or_path, lora_model=config.output_dir)
    print(f"Chat with it: {chat}")
    return 0


def _configure(started: float) -> TrainConfig:
    """The settings of the earlier run, if there is one, else of the model and length that suit this machine."""
    file, flags = _model()
    output = Path(load_train_config(file, flags).config.output_dir)
    if (output / SETTINGS).exists():
        return load_train_config(str(output / SETTINGS), {}).config
    steps, shown = _length(_try(file, flags), BUDGET_S - (time.time() - started))
    length = {"max_steps": steps, "eval_samples": shown, "eval_strategy": "steps", "eval_steps": steps}
    return load_train_config(file, {**flags, **{name: str(value) for name, value in length.items()}}).config


def _model() -> tuple[str, dict[str, str]]:
    """The configuration file and further settings of the model that this machine can get and train."""
    missing = f"{DEFAULT_MODEL} is too slow without a GPU or bf16 units"
    if find_machine().itemsize == 2:
        try:
            find_model(DEFAULT_MODEL, None, "auto")
        except UserError:
            missing = f"{DEFAULT_MODEL} is not in models/ and no hub answers"
        else:
            batches = {"per_device_train_batch_size": str(ROWS_A_STEP), "gradient_accumulation_steps": "1"}
            adapter = {"lora_r": "16", "lora_alpha": "32", "lora_dropout": "0", "learning_rate": "3e-4"}
            return "configs/train_config_lora.json", {"output_dir": "./output_demo_qwen", **batches, **adapter}
    _say(f"{missing}: the demo trains SmolLM2-135M.")
    return "configs/demo_smollm2.json", {"model_name_or_path": str(fetch(Path("models")))}


def _try(file: str, flags: Mapping[str, str]) -> Trial | None:
    """Measure a run of a few steps, in a process of its own, whose memory is not the demo's; None: too fast to measure.

    Raises:
        UserError: it failed.
    """
    _say(f"Measuring how fast this machine trains: {TRIAL_STEPS} steps ...")
    with tempfile.TemporaryDirectory(prefix="qingtune-demo-") as folder:
        own = {"max_steps": TRIAL_STEPS, "logging_steps": 1, "report_to": "none", "output_dir": f"{folder}/trial"}
        words = [f"--{name}={value}" for name, value in {**flags, **own, "eval_strategy": "no"}.items()]
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "fine_tune_qwen.py"), "--config_file", file, *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise UserError(f"the trial run failed:\n{ended.stderr.strip()}")
        metrics = Path(folder, "trial", METRICS)
        rate = measured_speed(metrics)
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        startup = time.monotonic() - began - sum(row["seconds"] for row in rows)
    return Trial(startup, sum(row["tokens"] for row in rows) / len(rows), rate) if rate else None


def _length(trial: Trial | None, left_s: float) -> tuple[int, int]:
    """Steps, and prompts to answer, for the seconds that are left; says why."""
    if trial is None:
        return MOST_STEPS, SHOWN
    speed = f"This machine trains {trial.tokens_per_second:,.0f} tokens a second"
    for shown in range(SHOWN, 0, -1):
        steps = trial.steps_within(left_s - RESERVE_S, shown)
        if steps >= FEWEST_STEPS:
            _say(f"{speed}: {steps} steps, about {trial.seconds(steps, shown) / 60:.1f} minutes.")
            return steps, shown
    minutes = (BUDGET_S - left_s + trial.seconds(FEWEST_STEPS, 1)) / 60
    _say(
        f"{speed}, which is slow: with {FEWEST_STEPS} steps, the fewest that change its answers, the demo may take "
        f"{minutes:.0f} minutes instead of {BUDGET_S / 60:.0f}. Ctrl-C saves after the step and stops; make demo "
        "resumes it."
    )
    return FEWEST_STEPS, 1


def _show(config: TrainConfig) -> None:
    """Answers before the first and after the last step side by side, under their prompts, as the report has them.

    Raises:
        UserError: the run kept no answers, as those of earlier versions did not.
    """
    file = Path(config.output_dir) / SAMPLES
    if not file.exists():
        fix = f"Rename {config.output_dir} and run make demo again."
        raise UserError("this run of an earlier version kept no answers", where=config.output_dir, fix=fix)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    before, after = ([line["answer"] for line in lines if line["step"] == step] for step in (0, lines[-1]["step"]))
    assert config.eval_data_path
    prompts = [prompt for _, prompt in rows_with_prompts(config.eval_data_path[0])]
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for prompt, old, new in zip(prompts, before, after, strict=False):
        table = Table(title=None, expand=True, show_lines=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(old, new)
        console.print(prompt if isinstance(prompt, str) else prompt[-1].content, markup=False)
        console.print(table)
        console.print()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
