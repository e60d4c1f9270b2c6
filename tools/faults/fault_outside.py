"""Trials: what comes from outside a run: disks, folders, numbers, memory, weights and data that are not as before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import fault_corpus
import fault_paths
import foreign_rows  # pyright: ignore[reportMissingImports]
from fault_harness import (
    LORA,
    Bench,
    Lost,
    edit_json,
    environment,
    same_result,
    steps_done,
    tree,
    unchanged,
    weights_hash,
)
from fault_list import fault
from fault_stops import stopped

from qingtune.data import fields

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
            bench.train("run", LORA).expect(0, "Warning: checkpoint skipped. ", "Resuming from ", "checkpoint-3")
            same_result(bench.folder / "run", bench.folder / "whole")
            count += 1
    return f"{count} times; the same in the end, bit for bit"


@fault(
    "a full disk (tmpfs of 600 kB) during saving",
    "a warning, no half files, a message that the result is missing; training continues",
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
        bench.train("run", settings).expect(2, "could not be written", "Training continues")
        for path in sorted((disk / "run").glob("checkpoint-*"))[:-1]:
            shutil.rmtree(path)
        bench.train("run", settings | {"save_total_limit": 1}).expect(0)
        same_result(disk / "run", bench.folder / "whole")
        return "checkpoints left out with warnings; after room was made it resumed; the same, bit for bit"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@fault("output_dir not writable, a file, or holding other files", "exit 2, nothing touched")
def other_folders(bench: Bench) -> str:
    (bench.folder / "file").write_text("mine")
    (bench.folder / "thesis").mkdir()
    (bench.folder / "thesis" / "chapter.tex").write_text("mine")
    before = tree(bench.folder)
    bench.train("file", LORA).expect(2, "output_dir is a file")
    bench.train("thesis", LORA | {"overwrite_output_dir": True}).expect(2, "files that do not belong to a training run")
    bench.train("model", LORA).expect(2, "files that do not belong to a training run")
    bench.train("x", LORA | {"output_dir": "/proc/out"}).expect(2)
    unchanged(before, bench.folder)
    return "refused; nothing touched"


@fault("two runs started on one output folder", "the second is refused")
def two_runs(bench: Bench) -> str:
    first = subprocess.Popen(
        bench.command("run", LORA | {"max_steps": 300}), cwd=fault_paths.ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
    bench.train("run", LORA).expect(2, "trackers: this is a link")
    (folder / "trackers").unlink()
    bench.train("run", LORA).expect(0, "Warning: checkpoint skipped. ")
    bench.train("run", LORA | {"overwrite_output_dir": True, "save_total_limit": 1}).expect(0)
    unchanged(before, outside)
    return "nothing outside was touched"


# --- Numbers and memory ----------------------------------------------------------------------------------------------


@fault("NaN in a loss; NaN in a gradient", "no update, the value and the rows named; five in a row stop the run")
def not_finite(bench: Bench) -> str:
    spoil = (
        "from qingtune.kernels.decoder import TrainingDecoder as D\nold, n = D.add_gradients, []\n"
        "def add(self, batch, scale):\n    n.append(1); bad = len(n) in {where}\n"
        "    return old(self, batch, scale * (float('nan') if bad and {gradient} else 1)) * "
        "(float('nan') if bad and not {gradient} else 1)\nD.add_gradients = add"
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
    return "no update; value and rows named; stopped after five, checkpoints kept"


LIMITED = (
    "import resource, psutil, torch, qingtune.commands.train, transformers.modeling_utils, bitsandbytes\n"
    "most = psutil.Process().memory_info().vms + {room}\nresource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
)


@fault(
    "a memory limit that the first batch exceeds", "refused before it happens, or the step is done in smaller passes"
)
def memory(bench: Bench) -> str:
    rows = bench.folder / "long.jsonl"
    edit_json(bench.model / "config.json", {"max_position_embeddings": 40_000})
    settings = LORA | {
        "data_path": rows, "max_seq_length": 30_000, "max_steps": 2, "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
    }  # fmt: skip

    def write(sentences: int) -> None:
        text = "a long answer that goes on and on. " * sentences
        rows.write_text("".join(json.dumps({"instruction": f"tell {n}", "output": text}) + "\n" for n in range(16)))

    write(700)
    refused = bench.train("refused", settings, LIMITED.format(room="200 * 2**20"))
    refused.expect(2, "memory", "Set max_seq_length to ")
    write(60)
    blind = "from qingtune.training import engine as e\ne.free_bytes = lambda *a, **k: None\n"
    blind += "e.TOKENS_PER_PASS_ON_CPU = 10**6\n"
    small = bench.train("small", settings, blind + LIMITED.format(room="300 * 2**20"))
    small.expect(0, "Out of memory in a pass of ")
    return "refused with numbers where it can be foreseen; else repeated in smaller passes"


# --- What leaves, and what comes in -----------------------------------------------------------------------------------


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


@fault("other weights of the same path, size and time, after QLoRA kept its 4-bit layers", "the new weights are used")
def same_size_and_time(bench: Bench) -> str:
    settings = LORA | {"use_qlora": True, "quantization_bit": 4, "max_steps": 2}
    bench.train("old", settings).expect(0)
    file = bench.model / "model.safetensors"
    mine, times = file.read_bytes(), file.stat()
    others, start = bytearray(mine), 8 + int.from_bytes(mine[:8], "little")
    others[start + 2 :: 4] = bytes(byte ^ 0x40 for byte in others[start + 2 :: 4])  # the fraction of each number
    file.write_bytes(others)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    bench.train("new", settings).expect(0)
    fresh = bench.command("fresh", settings)
    bench.run(fresh, QINGTUNE_CACHE=str(bench.folder / "another cache")).expect(0)
    file.write_bytes(mine)
    same_result(bench.folder / "new", bench.folder / "fresh")
    if weights_hash(bench.folder / "new") == weights_hash(bench.folder / "old"):
        raise Lost("the weights do not matter here")
    return "the same as with an empty cache, bit for bit"


OTHER_KINDS = {
    fields.PREFERENCE: (foreign_rows.DPO_ALPACA, foreign_rows.DPO_MESSAGES, foreign_rows.DPO_SHAREGPT),
    fields.LABELLED: (foreign_rows.KTO_MESSAGES, foreign_rows.KTO_COMPLETION),
    fields.MULTIMODAL: (foreign_rows.IMAGES_SHAREGPT, foreign_rows.IMAGES_OPENAI),
    fields.TOOLS: (foreign_rows.SHAREGPT_TOOLS, foreign_rows.OPENAI_TOOLS),
}


@fault(
    "data of other kinds (DPO, KTO, images, tools), with on_bad_row raise and skip", "refused by name, never trained"
)
def other_kinds(bench: Bench) -> str:
    commands: dict[str, list[str]] = {}
    kinds: list[str] = []
    for kind, sets in OTHER_KINDS.items():
        for rows in sets:
            file = bench.folder / f"{len(kinds)}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            for choice in ("raise", "skip"):
                settings = LORA | {"data_path": file, "on_bad_row": choice}
                commands[f"{file.name} {choice}"] = bench.training("out", settings)
                kinds.append(kind)
    for kind, ended in zip(kinds, bench.in_one_process(commands).values(), strict=True):
        ended.expect(2, kind)
    if (bench.folder / "out").exists():
        raise Lost("something was trained")
    return f"{len(commands)} runs refused, each with the kind's name"
