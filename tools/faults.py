"""Break runs in every way we know, with real processes, disks and files, and write docs/faults.md: `make faults`.

python tools/faults.py [--only WORD] [--kills 50]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_corpus
from fault_harness import (
    COMMON,
    KILL,
    LORA,
    ROOT,
    Bench,
    Lost,
    environment,
    same_result,
    steps_done,
    tree,
    unchanged,
)

REPORT = ROOT / "docs" / "faults.md"
METHODS: dict[str, dict[str, Any]] = {
    "full fp32": {},
    "LoRA bf16": LORA | {"bf16": True},
    "QLoRA 4-bit": LORA | {"use_qlora": True, "quantization_bit": 4},
    "QLoRA 8-bit": LORA | {"use_qlora": True, "quantization_bit": 8},
}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, what should come of it, and the trial: it returns what was seen or raises Lost."""

    name: str
    expected: str
    trial: Callable[[Bench], str]


FAULTS: list[Fault] = []


def fault(name: str, expected: str) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Enter a trial in the list."""

    def enter(trial: Callable[[Bench], str]) -> Callable[[Bench], str]:
        FAULTS.append(Fault(name, expected, trial))
        return trial

    return enter


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
    "before the rename": "from qingtune import files as f\nold, n = os.rename, []\n"
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
    "while the result is written": "import qingtune.finetune as f\nold, n = os.replace, []\n"
    "def replace(a, b):\n    old(a, b)\n"
    f"    if str(b).endswith('adapter_config.json'): {KILL}\nos.replace = replace",
}


def killed_at(bench: Bench, spoil: str) -> str:
    bench.train("whole", LORA).expect(0)
    ended = bench.train("killed", LORA, spoil)
    if ended.code != -9:
        raise Lost(f"it was not killed: {ended.code} {ended.output[-500:]}")
    bench.train("killed", LORA).expect(0, "Going on from ")
    same_result(bench.folder / "killed", bench.folder / "whole")
    return "went on; the same, bit for bit; nothing half done is left"


for _name, _spoil in MOMENTS.items():
    fault(f"SIGKILL {_name}", "goes on from a whole checkpoint")(lambda bench, spoil=_spoil: killed_at(bench, spoil))

SIGNAL_IN_A_WINDOW = (
    "from qingtune.kernels.decoder import Decoder\nold, n = Decoder.add_gradients, []\n"
    "def add(self, batch, scale):\n    n.append(1)\n    if len(n) == 8: os.kill(os.getpid(), signal.{name})\n"
    "    return old(self, batch, scale)\nDecoder.add_gradients = add"
)


@fault("SIGTERM and Ctrl-C within an accumulation window", "step finished, saved, exit 130, the command to go on")
def signals(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    longest = 0.0
    for name in ("SIGTERM", "SIGINT"):
        ended = bench.train(name, LORA, SIGNAL_IN_A_WINDOW.format(name=name))
        ended.expect(130, "Finishing the step, then saving", "Stopped and saved after step 4. To go on: ")
        longest = max(longest, ended.seconds)
        bench.train(name, LORA).expect(0)
        same_result(bench.folder / name, bench.folder / "whole")
    return f"exit 130 {longest:.0f} s after the command began; went on; the same, bit for bit"


@fault("a second signal", "leaves at once, the last checkpoint whole")
def second_signal(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    twice = SIGNAL_IN_A_WINDOW.format(name="SIGINT").replace("len(n) == 8", "len(n) in (8, 9)")
    bench.train("stopped", LORA | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}, twice)
    if steps_done(bench.folder / "stopped") >= COMMON["max_steps"]:
        raise Lost("it was not stopped")
    bench.train("stopped", LORA | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}).expect(0)
    return "went on from the last checkpoint"


# --- Going on --------------------------------------------------------------------------------------------------------

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
    spoil = (
        "from qingtune import work as w\nold, n = w.save_checkpoint, []\n"
        f"def save(*a):\n    old(*a); n.append(1)\n    if len(n) == 3: {KILL}\nw.save_checkpoint = save"
    )
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
    kill = (
        "import os\nfrom qingtune import work as w\nold, n = w.save_checkpoint, []\n"
        f"def save(*a):\n    old(*a); n.append(1)\n    if len(n) == 5: {KILL}\nw.save_checkpoint = save"
    )
    launch("killed", kill)
    shutil.copytree(bench.folder / "killed", bench.folder / "one")
    if launch("killed"):
        raise Lost("it did not go on")
    same_result(bench.folder / "killed", bench.folder / "whole")
    bench.train("one", LORA | {"per_device_train_batch_size": 4}).expect(0, "Going on from ")
    return "the same, bit for bit; one process goes on with the same samples a step"


def stopped(bench: Bench, name: str) -> Path:
    """A run that a signal ended after step 4."""
    bench.train(name, LORA, SIGNAL_IN_A_WINDOW.format(name="SIGTERM")).expect(130)
    return bench.folder / name


@fault("another batch split with the same samples a step", "goes on exactly")
def other_split(bench: Bench) -> str:
    folder = stopped(bench, "run")
    bench.train("run", LORA | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}).expect(
        0, f"Going on from {folder / 'checkpoint-4'}"
    )
    return "went on from step 4"


@fault("another configuration for the same folder", "exit 2, what differs and what to do; nothing written")
def other_settings(bench: Bench) -> str:
    before = tree(stopped(bench, "run"))
    for change in ({"learning_rate": 0.5}, {"lora_r": 2}, {"per_device_train_batch_size": 3}, {"seed": 7}):
        bench.train("run", LORA | change).expect(
            2, "was started with other settings", " was ", "--overwrite_output_dir"
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


# --- Broken checkpoints, disks, folders ------------------------------------------------------------------------------


@fault("the newest checkpoint cut off, or one bit of it flipped", "passed over with a warning, the one before is used")
def broken_newest(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    count = 0
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        for harm in ("cut", "flip"):
            shutil.rmtree(bench.folder / "run", ignore_errors=True)
            newest = stopped(bench, "run") / "checkpoint-4" / name
            content = bytearray(newest.read_bytes())
            if harm == "cut":
                del content[-5:]
            else:
                content[len(content) // 2] ^= 1
            newest.write_bytes(content)
            bench.train("run", LORA).expect(0, "Warning: passed over. ", "Going on from ", "checkpoint-3")
            same_result(bench.folder / "run", bench.folder / "whole")
            count += 1
    return f"{count} times; the same in the end, bit for bit"


@fault(
    "a full disk (tmpfs of 600 kB) during saving", "a warning, no half files; the result told to be missing; goes on"
)
def full_disk(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    disk = bench.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        return "not tried: mounting a small disk needs root"
    try:
        settings = LORA | {"save_total_limit": 100, "output_dir": disk / "run"}
        bench.train("run", settings).expect(2, "could not be written", "Training goes on")
        for path in sorted((disk / "run").glob("checkpoint-*"))[:-1]:
            shutil.rmtree(path)
        bench.train("run", settings | {"save_total_limit": 1}).expect(0)
        same_result(disk / "run", bench.folder / "whole")
        return "checkpoints left out with warnings; after room was made it went on; the same, bit for bit"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@fault("output_dir not writable, a file, or holding other files", "exit 2, nothing touched")
def other_folders(bench: Bench) -> str:
    (bench.folder / "file").write_text("mine")
    (bench.folder / "thesis").mkdir()
    (bench.folder / "thesis" / "chapter.tex").write_text("mine")
    before = tree(bench.folder)
    bench.train("file", LORA).expect(2, "output_dir is a file")
    bench.train("thesis", LORA | {"overwrite_output_dir": True}).expect(2, "files that are not of a training run")
    bench.train("model", LORA).expect(2, "files that are not of a training run")
    bench.train("x", LORA | {"output_dir": "/proc/out"}).expect(2)
    unchanged(before, bench.folder)
    return "refused; nothing touched"


@fault("two runs started on one output folder", "the second is refused")
def two_runs(bench: Bench) -> str:
    first = subprocess.Popen(
        bench.command("run", LORA | {"max_steps": 300}), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (bench.folder / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    bench.train("run", LORA | {"max_steps": 300}).expect(
        2, f"another run is writing to this output_dir (process {first.pid})"
    )
    if first.wait():
        raise Lost("the first run was disturbed")
    return "the second refused, the first undisturbed"


@fault("path tricks: links as checkpoints, names with .. in pointer and manifest", "nothing outside is read or removed")
def paths(bench: Bench) -> str:
    outside = bench.folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    folder = stopped(bench, "run")
    (folder / "checkpoint-9").symlink_to(outside)
    (folder / "trackers").symlink_to(outside)
    (folder / "latest_checkpoint.json").write_text(json.dumps({"folder": "../outside"}))
    manifest = folder / "checkpoint-4" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../outside/precious"] = {"bytes": 4, "sha256": "0"}
    manifest.write_text(json.dumps(content))
    before = tree(outside)
    bench.train("run", LORA).expect(0, "passed over")
    bench.train("run", LORA | {"overwrite_output_dir": True, "save_total_limit": 1}).expect(0)
    unchanged(before, outside)
    return "nothing outside was touched"


# --- Numbers and memory ----------------------------------------------------------------------------------------------


@fault("NaN in a loss; NaN in a gradient", "no update, the value and the rows told; five in a row stop the run")
def not_finite(bench: Bench) -> str:
    spoil = (
        "from qingtune.kernels.decoder import Decoder\nold, n = Decoder.add_gradients, []\n"
        "def add(self, batch, scale):\n    n.append(1); bad = len(n) in {where}\n"
        "    return old(self, batch, scale * (float('nan') if bad and {gradient} else 1)) * "
        "(float('nan') if bad and not {gradient} else 1)\nDecoder.add_gradients = add"
    )
    for gradient in (False, True):
        name = f"run {gradient}"
        bench.train(name, LORA, spoil.format(where="(3, 4)", gradient=gradient)).expect(
            0, "step 2: loss ", "no update. Rows: ", "rows.jsonl:"
        )
        lines = (bench.folder / name / "metrics.jsonl").read_text().splitlines()
        if '"not_finite": {' not in lines[1] or "nan" not in lines[1]:
            raise Lost(f"the true value is not in the log: {lines[1]}")
    bench.train("all", LORA, spoil.format(where="range(5, 99)", gradient=True)).expect(2, "not finite 5 steps in a row")
    if steps_done(bench.folder / "all") != 6:
        raise Lost(f"the last checkpoint is {steps_done(bench.folder / 'all')}")
    return "no update; value and rows told; stopped after five, checkpoints kept"


LIMITED = (
    "import resource, psutil, torch, qingtune.finetune, transformers.modeling_utils, bitsandbytes\n"
    "most = psutil.Process().memory_info().vms + {room}\nresource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
)


@fault("a memory limit that the first batch exceeds", "told before it happens, or the step is done in smaller passes")
def memory(bench: Bench) -> str:
    rows = bench.folder / "long.jsonl"
    config = bench.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 40_000}))
    settings = LORA | {
        "data_path": rows, "max_seq_length": 30_000, "max_steps": 2, "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
    }  # fmt: skip

    def write(sentences: int) -> None:
        text = "a long answer that goes on and on. " * sentences
        rows.write_text("".join(json.dumps({"instruction": f"tell {n}", "output": text}) + "\n" for n in range(16)))

    write(700)
    told = bench.train("told", settings, LIMITED.format(room="200 * 2**20"))
    told.expect(2, "memory", "Set max_seq_length to ")
    write(60)
    blind = "from qingtune import engine as e\ne.free_bytes = lambda *a, **k: None\ne.TOKENS_PER_PASS_ON_CPU = 10**6\n"
    small = bench.train("small", settings, blind + LIMITED.format(room="300 * 2**20"))
    small.expect(0, "Out of memory in a pass of ")
    return "refused with numbers where it can be foreseen; else repeated in smaller passes"


# --- Strangers' files ------------------------------------------------------------------------------------------------

BOMB = (
    "import pickle, sys\nclass Bomb:\n    def __reduce__(self):\n        import os\n"
    "        return os.system, ('touch ' + sys.argv[2],)\nopen(sys.argv[1], 'wb').write(pickle.dumps(Bomb()))"
)


@fault("a pickle bomb in each place a pickle could be read", "never run")
def pickles(bench: Bench) -> str:
    went_off = bench.folder / "went off"
    folder = stopped(bench, "run")
    places = [
        bench.folder / "model" / "pytorch_model.bin", bench.folder / "model" / "adapter_model.bin",
        *(folder / "checkpoint-4" / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
        folder / "checkpoint-4" / "training_args.bin", folder / "adapter_model.bin", bench.folder / "rows.pkl",
        folder / "checkpoint-4" / "weights.safetensors",
    ]  # fmt: skip
    for place in places:
        subprocess.run([sys.executable, "-c", BOMB, str(place), str(went_off)], check=True)
    bench.train("run", LORA).expect(0, "passed over")
    bench.train("data", LORA | {"data_path": bench.folder / "rows.pkl"}).expect(2, "this kind of file is not known")
    infer = [sys.executable, "-m", "qingtune", "infer", "--base_model", str(bench.model), "--prompt", "hi"]
    bench.run([*infer, "--lora_model", str(folder), "--max_new_tokens", "2"]).expect(0)
    weights = (bench.folder / "model" / "model.safetensors").rename(bench.folder / "put away")
    bench.run([*infer, "--max_new_tokens", "2"]).expect(2, "pickles, which can run code")
    weights.rename(bench.folder / "model" / "model.safetensors")
    if went_off.exists():
        raise Lost("a pickle was read")
    return f"{len(places)} bombs, none went off"


@fault("a model with code of its own (auto_map); templates that loop or escape", "refused; nothing of theirs runs")
def strangers_code(bench: Bench) -> str:
    mark = bench.folder / "went off"
    config = bench.model / "config.json"
    plain = config.read_text()
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (bench.model / name).write_text(code)
    auto = {
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "modeling_x.M",
        "AutoTokenizer": "tokenization_x.T",
    }
    config.write_text(json.dumps(json.loads(plain) | {"model_type": "stranger", "auto_map": auto}))
    bench.train("auto", LORA).expect(2, "needs code of its own (auto_map), which is never run here")
    config.write_text(json.dumps(json.loads(plain) | {"auto_map": auto}))
    bench.train("native", LORA).expect(0)
    config.write_text(plain)
    templates = {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it was stopped after 10 s",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": "chat template fails",
        f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}": "chat template fails",
        "{{ 'x' * 10 ** 11 }}": "chat template fails",
    }
    for template, message in templates.items():
        (bench.model / "chat_template.jinja").write_text(template)
        bench.train("template", LORA).expect(2, message)
    if mark.exists():
        raise Lost("a stranger's code ran")
    return f"refused, or their own code passed over; {len(templates)} templates refused"


@fault("secrets in the environment and in settings", "in nothing that is written or shown")
def secrets(bench: Bench) -> str:
    planted = "zq7-planted-zq7"
    env = {
        "HF_TOKEN": planted, "WANDB_API_KEY": planted, "MODELSCOPE_API_TOKEN": planted, "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://me:{planted}@127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": planted,
    }  # fmt: skip
    shown = bench.run(bench.command("run", LORA | {"report_to": "tensorboard"}), **env).expect(0).output
    shown += bench.run(bench.command("none", LORA | {"model_name_or_path": "nobody/none"}), **env).expect(2).output
    shown += bench.run(bench.command("bad", LORA | {"hub_token": planted}), **env).output
    shown += bench.run(bench.command("crash", LORA, f"raise RuntimeError({planted!r}) if 0 else None"), **env).output
    written = [name for name, content in tree(bench.folder).items() if planted.encode() in content]
    if planted in shown or written:
        raise Lost(f"shown: {planted in shown}; written in {written}")
    return f"looked for in {len(tree(bench.folder))} files and {len(shown):,} characters of output: nowhere"


@fault(
    f"{len(fault_corpus.DATA)} malformed data files and {len(fault_corpus.CONFIGS)} malformed configurations",
    "exit 2, a message with file and line, no traceback, nothing written",
)
def corpus(bench: Bench) -> str:
    wrong = fault_corpus.check_data(bench.folder / "data") + fault_corpus.check_configs(bench.folder / "configs")
    if wrong:
        raise Lost("; ".join(wrong))
    return "as expected, all"


# --- The table -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Try all, print and write the table; 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="faults whose name holds this; docs/faults.md is then left as it is")
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    global KILLS
    KILLS = arguments.kills
    lines = ["| fault | expected | seen | survived |", "|---|---|---|---|"]
    lost = tried = lost_bytes = kills = 0
    for number, one in enumerate(FAULTS):
        if arguments.only and arguments.only not in one.name:
            continue
        with tempfile.TemporaryDirectory(prefix=f"fault-{number}-") as scratch:
            os.environ["QINGTUNE_CACHE"] = f"{scratch}/cache"
            began = time.monotonic()
            bench = Bench(Path(scratch) / "bench", arguments.kills)
            try:
                seen, survived = one.trial(bench), "yes"
            except Lost as error:
                seen, survived = str(error).replace(scratch, "..."), "**no**"
            lost_bytes, kills = lost_bytes + bench.lost_bytes(), kills + bench.counted_kills
        tried, lost = tried + 1, lost + (survived != "yes")
        print(f"{survived}: {one.name}: {seen} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        lines.append(f"| {one.name} | {one.expected} | {seen.splitlines()[0][:200]} | {survived} |")
    text = "\n".join(lines) + (
        f"\n\nFaults tried: {tried}. Survived: {tried - lost}. Bytes lost: {lost_bytes:,}, counted over the user's "
        f"weights and data at each fault's end and over the newest checkpoint after each of {kills:,} kills.\n"
    )
    print(text)
    if not arguments.only:
        kills = f"At random moments: {arguments.kills} kills with LoRA, {max(arguments.kills // 5, 1)} each otherwise."
        REPORT.write_text(f"{HEADER}{kills}\n\n{text}", encoding="utf-8")
    return 1 if lost else 0


HEADER = """\
# Faults

Made by `make faults` (tools/faults.py): real processes on a tiny model, killed, starved and fed with rubbish. "The
same, bit for bit" compares the final weights and metrics.jsonl with those of a run that nothing happened to.

"""

if __name__ == "__main__":
    sys.exit(main())
