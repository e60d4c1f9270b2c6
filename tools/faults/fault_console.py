"""Trials: the terminal, notebook, user and limits that a command finds itself with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fault_harness import LORA, Bench, Lost, environment, same_result
from fault_list import fault
from fault_stops import SIGNAL_IN_A_WINDOW

LOGS = {
    "| head -n 5": '"$@" 2>&1 | head -n 5; exit "${PIPESTATUS[0]}"',
    "all of it on a full disk": 'exec "$@" > /dev/full 2>&1',
    "no stdin, stdout, stderr": 'exec "$@" <&- >&- 2>&-',
}


def in_shell(script: str, command: list[str]) -> list[str]:
    """A command as "$@" of a line of bash."""
    return ["bash", "-c", script, "bash", *command]


@fault("the log ends: 2>&1 | head -n 5, stderr on a full disk, all three descriptors closed", "trains to its end")
def logs(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    for number, script in enumerate(LOGS.values()):
        bench.run(in_shell(script, bench.command(f"run {number}", LORA))).expect(0)
        same_result(bench.folder / f"run {number}", bench.folder / "whole")
    return f"exit 0 {len(LOGS)} times; the same, bit for bit"


@fault("SIGHUP under nohup", "ignored")
def nohup(bench: Bench) -> str:
    bench.train("whole", LORA).expect(0)
    command = bench.command("run", LORA, SIGNAL_IN_A_WINDOW.format(name="SIGHUP"))
    bench.run(in_shell('trap "" HUP; exec "$@"', command)).expect(0)
    same_result(bench.folder / "run", bench.folder / "whole")
    return "trained to its end; the same, bit for bit"


@fault("MPLBACKEND of a notebook, and of nonsense", "the run ends well and has its curve")
def backends(bench: Bench) -> str:
    for number, backend in enumerate(("module://matplotlib_inline.backend_inline", "nonsense")):
        command = bench.command(f"run {number}", LORA | {"max_steps": 2})
        bench.run(command, MPLBACKEND=backend).expect(0)
        if not (bench.folder / f"run {number}" / "loss_curve.png").read_bytes().startswith(b"\x89PNG"):
            raise Lost(f"no curve with {backend}")
    bench.qingtune("report", "--output_dir", bench.folder / "run 0", MPLBACKEND="nonsense").expect(0)
    return "both runs and a report of one ended as ever"


@fault("a cache that cannot be written", "one line about it; trains and answers all the same")
def no_cache(bench: Bench) -> str:
    settings = LORA | {"use_qlora": True, "quantization_bit": 4, "max_steps": 2}
    bench.train("whole", settings).expect(0)
    bench.run(bench.command("run", settings), QINGTUNE_CACHE="/proc/cache").expect(0)
    same_result(bench.folder / "run", bench.folder / "whole")
    bench.qingtune(*bench.answering(), QINGTUNE_CACHE="/proc/cache").expect(0)
    return "trained, the same, bit for bit; answered"


@fault("HOME unset and a user without an entry or rights", "answers, or says in one line what to set")
def nobody(bench: Bench) -> str:
    around = [Path(sys.prefix), Path(sys.base_prefix), *Path(sys.base_prefix).parents]
    if os.name == "nt" or os.geteuid() != 0 or not all(path.stat().st_mode & 1 for path in around):
        return "not tried: needs root, and Python where every user can run it"
    for path in (bench.folder.parent, bench.folder, bench.model, *bench.model.iterdir()):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    env = {name: value for name, value in environment().items() if name not in ("HOME", "QINGTUNE_CACHE", "USER")}
    done = subprocess.run(
        bench.python(*bench.answering()), cwd="/", env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False, user=54321, group=54321, extra_groups=[],
    )  # fmt: skip
    if "Traceback" in done.stdout or done.returncode not in (0, 2):
        raise Lost(f"exit code {done.returncode}: {done.stdout[-900:]}")
    return "answered" if done.returncode == 0 else done.stdout.strip().splitlines()[-1]


@fault(
    "ulimit -f smaller than a checkpoint", "a warning, training continues; it says that there is no result; resumable"
)
def largest_file(bench: Bench) -> str:
    settings = {"max_steps": 4, "learning_rate": 0.001}
    bench.train("whole", settings).expect(0)
    bench.run(in_shell('ulimit -f 40; exec "$@"', bench.command("run", settings))).expect(2, "could not be written")
    if half_done := [path.name for path in (bench.folder / "run").iterdir() if path.name.startswith(".")]:
        raise Lost(f"left half done: {half_done}")
    bench.train("run", settings).expect(0)
    same_result(bench.folder / "run", bench.folder / "whole")
    return "warned, nothing half done; without the limit the same in the end, bit for bit"
