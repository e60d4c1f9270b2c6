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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "invariant")]

from conftest import instruction_rows, write_jsonl  # noqa: E402  # pyright: ignore[reportMissingImports]
from tiny_runs import metrics, save_model  # noqa: E402  # pyright: ignore[reportMissingImports]

PATIENCE_S = 300
LORA: dict[str, Any] = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
COMMON: dict[str, Any] = {
    "learning_rate": 0.005, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False,
    "report_to": "none", "logging_steps": 1, "save_steps": 1, "save_total_limit": 2, "max_steps": 12,
    "lr_scheduler_type": "cosine", "warmup_steps": 3,
}  # fmt: skip
# Runs the command as `qingtune` does, after some lines that spoil one of its parts.
SPOILED = "import os, signal, sys\n{spoil}\nfrom qingtune.cli import main\nsys.exit(main(sys.argv[1:]))"


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
        values = {"model_name_or_path": self.model, "data_path": self.data, "output_dir": self.folder / name}
        values |= COMMON | dict(settings)
        flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        start = ["-c", SPOILED.format(spoil=spoil)] if spoil else ["-m", "qingtune"]
        return [sys.executable, *start, "train", *flags]

    def train(self, name: str, settings: Mapping[str, Any], spoil: str = "") -> Ended:
        """Run a training command to its end, or until it kills itself."""
        ended = self.run(self.command(name, settings, spoil))
        if ended.code < 0:
            self.count_after_kill(name)
        return ended

    def run(self, command: list[str], **env: str) -> Ended:
        """Run any command to its end."""
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=PATIENCE_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
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
    """The environment of the commands: no GPU, no hub, a cache of their own."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **changes}


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


def missing_bytes(folder: Path) -> int:
    """Bytes that the pointer and the manifest of a run promise and that are not there, or are others."""
    pointer = folder / "latest_checkpoint.json"
    if not pointer.exists():
        return 0
    checkpoint = folder / json.loads(pointer.read_text(encoding="utf-8"))["folder"]
    promised = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    return sum(
        entry["bytes"]
        for name, entry in promised.items()
        if not (checkpoint / name).exists()
        or hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != entry["sha256"]
    )


def steps_done(folder: Path) -> int:
    """The step that the run would go on from."""
    name = json.loads((folder / "latest_checkpoint.json").read_text(encoding="utf-8"))["folder"]
    return int(name.removeprefix("checkpoint-"))


KILL = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
