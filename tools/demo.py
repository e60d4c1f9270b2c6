"""`make demo`: get a model, fine-tune it on bundled data, and show answers before and after side by side.

Qwen2.5-0.5B-Instruct on the Chinese samples if a folder of it is in models/ or a hub answers; else SmolLM2-135M on the
English ones. A second run finds everything done and only shows it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fetch_smollm2 import fetch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from qingtune.answering.speaker import load_speaker  # noqa: E402
from qingtune.commands.train import train  # noqa: E402
from qingtune.config.commands import InferConfig  # noqa: E402
from qingtune.config.load import load_train_config  # noqa: E402
from qingtune.config.training import DEFAULT_MODEL, TrainConfig  # noqa: E402
from qingtune.data.prompts import rows_with_prompts  # noqa: E402
from qingtune.errors import UserError  # noqa: E402
from qingtune.files.write import write_json  # noqa: E402
from qingtune.models.find import find_model  # noqa: E402

SHOWN = 2


def main() -> int:
    """Run the demo in the repository's root."""
    try:
        config = _configure()
        output = Path(config.output_dir)
        before = _answers(config, None, output.with_name(f"{output.name}_before") / "answers.json")
        if not train(config, command="make demo"):
            return 130
        after = _answers(config, output, output / "demo_answers.json")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(before, after)
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(
        f"Chat with it:\n  {shown} inference_lora.py --base_model {config.model_name_or_path} "
        f"--lora_model {output} --chat"
    )
    return 0


def _configure() -> TrainConfig:
    """The demo's settings for the model that can be had."""
    try:
        find_model(DEFAULT_MODEL, None, "auto")
    except UserError:
        print(f"{DEFAULT_MODEL} is not at hand and no hub answers: taking SmolLM2-135M.", file=sys.stderr)
        model = fetch(Path("models"))
        return load_train_config("configs/demo_smollm2.json", {"model_name_or_path": str(model)}).config
    flags = {
        "output_dir": "./output_demo_qwen",
        "max_steps": "40",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0",
    }
    flags |= {"learning_rate": "3e-4", "per_device_train_batch_size": "4", "gradient_accumulation_steps": "1"}
    return load_train_config("configs/train_config_lora.json", flags).config


def _answers(config: TrainConfig, adapter: Path | None, kept: Path) -> list[dict[str, str]]:
    """Prompts and answers on held-out rows, kept in a file for the next time."""
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    settings = InferConfig(
        base_model=config.model_name_or_path,
        lora_model=str(adapter) if adapter else None,
        max_new_tokens=220,
        temperature=0.0,
        repetition_penalty=1.1,
    )
    speaker = load_speaker(settings)
    assert config.eval_data_path is not None
    rows: list[dict[str, str]] = []
    for _, (_, prompt) in zip(range(SHOWN), rows_with_prompts(config.eval_data_path[0]), strict=False):
        print(f"answering {'after' if adapter else 'before'} training ...", file=sys.stderr, flush=True)
        answer = "".join(speaker.answer(prompt))
        rows.append({"prompt": prompt if isinstance(prompt, str) else prompt[-1].content, "answer": answer})
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, rows)
    return rows


def _show(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Answers side by side, under their prompts."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for old, new in zip(before, after, strict=True):
        table = Table(title=None, expand=True, show_lines=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(old["answer"], new["answer"])
        console.print(old["prompt"], markup=False)
        console.print(table)
        console.print()


if __name__ == "__main__":
    sys.exit(main())
