"""Trials: runs that are killed or stopped at every kind of moment, and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from fault_harness import (
    COMMON,
    KILL,
    LORA,
    Bench,
    Lost,
    same_result,
    steps_done,
    tree,
    unchanged,
)
from fault_list import fault

METHODS: dict[str, dict[str, Any]] = {
    "full fp32": {},
    "LoRA bf16": LORA | {"bf16": True},
    "QLoRA 4-bit": LORA | {"use_qlora": True, "quantization_bit": 4},
    "QLoRA 8-bit": LORA | {"use_qlora": True, "quantization_bit": 8},
}


# --- Killed ----------------------------------------------------------------------------------------------------------


def killed_again_and_again(bench: Bench, kills: int, settings: dict[str, Any], longest_s: float = 0.8) -> str:
    settings = settings | {"max_steps": 40 * kills}
    bench.train("whole", settings).expect(0)
    draw, killed = random.Random(kills), 0
    for _ in range(kills):
        killed += bench.kill_at_random("killed", settings, draw, longest_s)
    reached = steps_done(bench.folder / "killed")
    bench.train("killed", settings).expect(0)
    same_result(bench.folder / "killed", bench.folder / "whole")
    return (
        f"killed {killed} times within the first {reached:,} of {settings['max_steps']:,} steps; the same, bit for bit"
    )


@fault("SIGKILL at random moments, LoRA fp32, dropout, a checkpoint a step", "the uninterrupted run's weights")
def kill_lora(bench: Bench) -> str:
    return killed_again_and_again(bench, bench.kills, LORA)


for _name, _settings in METHODS.items():
    fault(f"SIGKILL at random moments, {_name}", "the uninterrupted run's weights")(
        lambda bench, settings=_settings: killed_again_and_again(
            bench, max(bench.kills // 5, 1), settings, longest_s=2.5
        )
    )

# Each is put in front of the command; the process kills itself at its fourth checkpoint.
MOMENTS = {
    "in the middle of a file of the checkpoint": "from qingtune.training import checkpoint as c\n"
    "old, n = c.save_file, []\n"
    "def save(tensors, path):\n    n.append(1); old(tensors, path)\n"
    f"    if len(n) == 8: os.truncate(path, os.path.getsize(path) // 2); {KILL}\nc.save_file = save",
    "before the rename": "from qingtune.files import write as f\nold, n = os.rename, []\n"
    "def rename(a, b):\n    n.append(1)\n"
    f"    if str(b).endswith('checkpoint-4'): {KILL}\n    old(a, b)\nos.rename = rename",
    "between the rename and the pointer": "from qingtune.training import checkpoint as c\nold = c.write_json\n"
    "def write(path, content):\n"
    f"    if content == {{'folder': 'checkpoint-4'}}: {KILL}\n    old(path, content)\nc.write_json = write",
    "in the middle of removing an old checkpoint": "import shutil\nold = shutil.rmtree\n"
    "def rmtree(path, **options):\n"
    "    inside = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []\n"
    f"    if any('checkpoint-2' in name for name in inside): os.unlink(os.path.join(inside[0], 'state.json')); {KILL}\n"
    "    old(path, **options)\nshutil.rmtree = rmtree",
    "while the result is written": "import qingtune.commands.train as f\nold, n = os.replace, []\n"
    "def replace(a, b, **at):\n    old(a, b, **at)\n"
    f"    if str(b).endswith('adapter_config.json'): {KILL}\nos.replace = replace",
}


KILLED_AT_A_CHECKPOINT = (
    "from qingtune.training import setup as w\nold, n = w.save_checkpoint, []\n"
    f"def save(*a):\n    old(*a); n.append(1)\n    if len(n) == {{count}}: {KILL}\nw.save_checkpoint = save"
)


def killed_at(bench: Bench, spoil: str) -> str:
    bench.train("whole", LORA).expect(0)
    ended = bench.train("killed", LORA, spoil)
    if ended.code != -9:
        raise Lost(f"it was not killed: {ended.code} {ended.output[-500:]}")
    bench.train("killed", LORA).expect(0, "Resuming from ")
    same_result(bench.folder / "killed", bench.folder / "whole")
    return "resumed; the same, bit for bit; nothing half done is left"


for _name, _spoil in MOMENTS.items():
    fault(f"SIGKILL {_name}", "resumes from a whole checkpoint")(lambda bench, spoil=_spoil: killed_at(bench, spoil))

SIGNAL_IN_A_WINDOW = (
    "from qingtune.kernels.decoder import TrainingDecoder as D\nold, n = D.add_gradients, []\n"
    "def add(self, batch, scale):\n    n.append(1)\n    if len(n) == 8: os.kill(os.getpid(), signal.{name})\n"
    "    return old(self, batch, scale)\nD.add_gradients = add"
)


@fault(
    "SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 within an accumulation window",
    "step finished, saved, exit 130, the command to resume",
)
def signals(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    longest = 0.0
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        ended = bench.train(name, LORA, SIGNAL_IN_A_WINDOW.format(name=name))
        ended.expect(130, "Finishing the step, then saving", "Stopped and saved after step 4. To resume: ")
        longest = max(longest, ended.seconds)
        bench.train(name, LORA).expect(0)
        same_result(bench.folder / name, bench.folder / "whole")
    return f"exit 130 {longest:.0f} s after the command began; resumed; the same, bit for bit"


@fault("a second signal", "leaves at once, the last checkpoint whole")
def second_signal(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    twice = SIGNAL_IN_A_WINDOW.format(name="SIGINT").replace("len(n) == 8", "len(n) in (8, 9)")
    settings = LORA | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    bench.train("stopped", settings, twice)
    if steps_done(bench.folder / "stopped") >= COMMON["max_steps"]:
        raise Lost("it was not stopped")
    bench.train("stopped", settings).expect(0)
    return "resumed from the last checkpoint"


# --- Resuming -------------------------------------------------------------------------------------------------------

EPOCHS = LORA | {
    "max_steps": -1, "num_train_epochs": 2, "val_size": 5, "eval_strategy": "steps", "eval_steps": 2,
    "load_best_model_at_end": True, "dataloader_num_workers": 2,
}  # fmt: skip


@fault(
    "killed after every third checkpoint of two epochs, with evaluation and best model",
    "the uninterrupted run's weights",
)
def kill_after_each_step(bench: Bench) -> str:
    bench.train("whole", EPOCHS).expect(0)
    spoil = KILLED_AT_A_CHECKPOINT.format(count=3)
    starts = 0
    while not (bench.folder / "killed" / "qingtune.json").exists():
        bench.train("killed", EPOCHS, spoil)
        starts += 1
    same_result(bench.folder / "killed", bench.folder / "whole")
    return f"{starts} starts; the same, bit for bit"


@fault(
    "two processes killed in mid-epoch", "the uninterrupted run's weights; also with one process and twice the batch"
)
def two_processes(bench: Bench) -> str:
    def launch(name: str, spoil: str = "") -> int:
        script = bench.folder / f"{name}.py"
        script.write_text(f"{spoil}\nimport sys\nfrom qingtune.cli import main\nsys.exit(main(sys.argv[1:]))\n")
        flags = bench.command(name, LORA)[3:]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        return bench.run([*launcher, *flags], OMP_NUM_THREADS="1").code

    if launch("whole"):
        raise Lost("two processes do not run")
    launch("killed", "import os\n" + KILLED_AT_A_CHECKPOINT.format(count=5))
    shutil.copytree(bench.folder / "killed", bench.folder / "one")
    if launch("killed"):
        raise Lost("it did not resume")
    same_result(bench.folder / "killed", bench.folder / "whole")
    bench.train("one", LORA | {"per_device_train_batch_size": 4}).expect(0, "Resuming from ")
    return "the same, bit for bit; one process resumes with the same samples a step"


def stopped(bench: Bench, name: str) -> Path:
    """A run that a signal ended after step 4."""
    bench.train(name, LORA, SIGNAL_IN_A_WINDOW.format(name="SIGTERM")).expect(130)
    return bench.folder / name


@fault("another batch split with the same samples a step", "resumes exactly")
def other_split(bench: Bench) -> str:
    folder = stopped(bench, "run")
    bench.train("run", LORA | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}).expect(
        0, f"Resuming from {folder / 'checkpoint-4'}"
    )
    return "resumed from step 4"


@fault("another configuration for the same folder", "exit 2, what differs and what to do; nothing written")
def other_settings(bench: Bench) -> str:
    before = tree(stopped(bench, "run"))
    for change in ({"learning_rate": 0.5}, {"lora_r": 2}, {"per_device_train_batch_size": 3}, {"seed": 7}):
        bench.train("run", LORA | change).expect(
            2, "was started with different settings", " was ", "--overwrite_output_dir"
        )
        unchanged(before, bench.folder / "run")
    return "refused four times, what differs named"


@fault("save_total_limit 1 with the best step not the last; clock moved backwards", "best and last kept, by step")
def best_kept(bench: Bench) -> str:
    spoil = "import time\nold = time.time\ntime.time = lambda: 10**9 - (old() % 10**6)"
    settings = EPOCHS | {
        "save_total_limit": 1,
        "optim": "sgd",
        "learning_rate": 20,
        "warmup_steps": 18,
        "eval_steps": 1,
    }
    bench.train("run", settings, spoil).expect(0)
    folder = bench.folder / "run"
    for number, path in enumerate(sorted(folder.glob("checkpoint-*"))):
        os.utime(path, (10**9 - number, 10**9 - number))
    kept = sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    best = json.loads((folder / "qingtune.json").read_text())["results"]["best_step"]
    if kept != [best, 18] or best == 18:
        raise Lost(f"kept {kept}, best {best}")
    return f"kept steps {kept}, the best being {best}"
