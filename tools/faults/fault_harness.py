"""What the fault suite needs to run real commands, break them at a chosen moment, and compare what is left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_paths
from conftest import instruction_rows, write_jsonl  # pyright: ignore[reportMissingImports]
from tiny_runs import metrics, save_model  # pyright: ignore[reportMissingImports]

ROOT = fault_paths.ROOT
PATIENCE_S = 900  # for one command; thousands of steps with a checkpoint each take minutes on a busy machine
LORA: dict[str, Any] = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
COMMON: dict[str, Any] = {
    "learning_rate": 0.005, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False,
    "report_to": "none", "logging_steps": 1, "save_steps": 1, "save_total_limit": 2, "max_steps": 12,
    "lr_scheduler_type": "cosine", "warmup_steps": 3,
}  # fmt: skip
# Runs the command as `qingtune` does, after some lines that spoil one of its parts.
SPOILED = "import os, signal, sys\n{spoil}\nfrom qingtune.cli import main\nsys.exit(main(sys.argv[1:]))"
MARK = "\n=== ended with "
ONE_AFTER_ANOTHER = f"""
import json, sys
from qingtune.cli import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    print(f"\\n{{code}}", end={MARK!r}, flush=True)
"""


class Lost(AssertionError):
    """A fault that was not survived."""


@dataclass
class Ended:
    """A command that ended."""

    code: int
    output: str
    seconds: float = 0.0

    def expect(self, code: int, *words: str) -> Ended:
        """Itself, if it ended with this code, said these words, and showed no traceback.

        Raises:
            Lost: otherwise.
        """
        missing = [word for word in words if word not in self.output]
        if self.code != code or missing or "Traceback" in self.output:
            raise Lost(
                f"exit code {self.code}, not {code}; missing {missing}; the end of its output:\n{self.output[-900:]}"
            )
        return self


@dataclass
class Bench:
    """A folder with a tiny model and data, in which commands run."""

    folder: Path
    kills: int
    model: Path = field(init=False)
    data: Path = field(init=False)
    lost_in_kills: int = 0
    counted_kills: int = 0

    def __post_init__(self) -> None:
        """Make model and data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = save_model(self.folder / "model")
        self.data = write_jsonl(self.folder / "rows.jsonl", instruction_rows(41))
        self._mine = {path: path.read_bytes() for path in (self.data, self.model / "model.safetensors")}

    def lost_bytes(self) -> int:
        """Bytes of the user's weights and data that are gone or changed, and of saved checkpoints after each kill."""
        mine = sum(
            len(content) for path, content in self._mine.items() if not path.exists() or path.read_bytes() != content
        )
        return mine + self.lost_in_kills

    def count_after_kill(self, name: str) -> None:
        """Count what is missing of the checkpoint that the pointer of a killed run names."""
        self.counted_kills += 1
        self.lost_in_kills += missing_bytes(self.folder / name)

    def command(self, name: str, settings: Mapping[str, Any], spoil: str = "") -> list[str]:
        """A training command with its output in a folder of this name."""
        return self.python(*self.training(name, settings), spoil=spoil)

    def training(self, name: str, settings: Mapping[str, Any]) -> list[str]:
        """The words of such a command after qingtune's name."""
        values = {"model_name_or_path": self.model, "data_path": self.data, "output_dir": self.folder / name}
        values |= COMMON | dict(settings)
        return ["train", *(part for key, value in values.items() for part in (f"--{key}", str(value)))]

    def answering(self, *words: object) -> list[object]:
        """The words of a short answer."""
        return ["infer", "--base_model", self.model, "--prompt", "hi", "--max_new_tokens", "2", *words]

    def train(self, name: str, settings: Mapping[str, Any], spoil: str = "") -> Ended:
        """Run a training command to its end, or until it kills itself."""
        ended = self.run(self.command(name, settings, spoil))
        if ended.code < 0:
            self.count_after_kill(name)
        return ended

    def qingtune(self, *words: object, spoil: str = "", **env: str) -> Ended:
        """Run any command of qingtune to its end, after lines that spoil one of its parts."""
        return self.run(self.python(*words, spoil=spoil), **env)

    def python(self, *words: object, spoil: str = "") -> list[str]:
        """The call of a command of qingtune, after lines that spoil one of its parts."""
        start = ["-c", SPOILED.format(spoil=spoil)] if spoil else ["-m", "qingtune"]
        return [sys.executable, *start, *map(str, words)]

    def in_one_process(self, commands: Mapping[str, Sequence[object]], **env: str) -> dict[str, Ended]:
        """Run many commands of qingtune one after another in a process of their own, which imports once; by name."""
        asked = json.dumps([[str(word) for word in words] for words in commands.values()])
        parts = self.run([sys.executable, "-c", ONE_AFTER_ANOTHER, asked], **env).output.split(MARK)
        if len(parts) != len(commands) + 1:
            raise Lost(f"command {len(parts)} of {len(commands)} ended the process: {parts[-1][-900:]}")
        endings = [part.rpartition("\n") for part in parts[:-1]]
        return {name: Ended(int(code), said) for name, (said, _, code) in zip(commands, endings, strict=True)}

    def adapter(self, **changes: object) -> Path:
        """An adapter of the model as other tools write it, with random weights; `changes` go into its settings."""
        import torch
        from safetensors.torch import save_file

        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        draw, shapes = torch.Generator().manual_seed(7), {"lora_A": (4, 32), "lora_B": (32, 4)}
        names = {f"base_model.model.model.layers.{n}.self_attn.q_proj.{ab}.weight": ab for n in (0, 1) for ab in shapes}
        tensors = {name: torch.randn(shapes[ab], generator=draw) for name, ab in names.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        return folder

    def run(self, command: list[str], **env: str) -> Ended:
        """Run any command to its end."""
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=PATIENCE_S, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Lost(f"{' '.join(command[3:5])}: no end after {PATIENCE_S} s") from None
        return Ended(done.returncode, done.stdout, time.monotonic() - began)

    def kill_at_random(self, name: str, settings: Mapping[str, Any], draw: random.Random, longest_s: float) -> bool:
        """Start a training command, SIGKILL it some time after training began; False if it ended before that."""
        command = self.command(name, settings)
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("Training: "):
                    break
            time.sleep(draw.random() * longest_s)
            still_there = process.poll() is None
            process.kill()
        self.count_after_kill(name)
        return still_there


def environment(**changes: str) -> dict[str, str]:
    """The environment of the commands: no GPU, no hub, a cache of their own, output buffered as users have it.

    One thread: tiny models gain nothing by more, and on a busy machine threads wait for each other.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**kept, **fixed, **changes}


def same_result(one: Path, two: Path) -> None:
    """Have two runs end with the same weights and metrics, bit for bit, and nothing half done about.

    Raises:
        Lost: they do not.
    """
    for folder in (one, two):
        if half_done := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
            raise Lost(f"left half done: {half_done}")
        if not (folder / "qingtune.json").exists():
            raise Lost(f"{folder.name} is not finished")
    if weights_hash(one) != weights_hash(two):
        raise Lost("the final weights differ")
    if metrics(one) != metrics(two):
        raise Lost("the metrics differ")


def weights_hash(folder: Path) -> str:
    """Of the result's weights."""
    paths = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unchanged(before: dict[str, bytes], folder: Path) -> None:
    """Have nothing changed below a folder.

    Raises:
        Lost: something did.
    """
    now = tree(folder)
    if changed := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise Lost(f"changed: {changed}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run's pointer names; None if nothing was saved yet."""
    pointer = folder / "latest_checkpoint.json"
    return folder / json.loads(pointer.read_text(encoding="utf-8"))["folder"] if pointer.exists() else None


def missing_bytes(folder: Path) -> int:
    """Bytes that the pointer and the manifest of a run promise and that are missing or different."""
    checkpoint = newest_checkpoint(folder)
    if not checkpoint:
        return 0
    promised = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    return sum(
        entry["bytes"]
        for name, entry in promised.items()
        if not (checkpoint / name).exists()
        or hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != entry["sha256"]
    )


def steps_done(folder: Path) -> int:
    """The step that the run would resume after; 0 if nothing was saved yet."""
    checkpoint = newest_checkpoint(folder)
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def edit_json(path: Path, changes: Mapping[str, object]) -> None:
    """Set values in a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


KILL = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
