"""Trials: merge, export and infer over what is there already, and stopped while they write."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from fault_harness import KILL, ROOT, Bench, Lost, environment, tree, unchanged
from fault_list import fault

from qingtune.runs.result_folder import RESULT_FILES, Listed, looks_of

AT_THE_SWITCH = (
    "import time\nimport qingtune.runs.result_folder as r\nold = r.ResultFolder.put\n"
    "def put(self, *a, **k):\n    {harm}\n    old(self, *a, **k)\nr.ResultFolder.put = put"
)
AT_A_RENAME = "old, n = os.rename, []\ndef rename(a, b):\n    {before}\n    old(a, b)\n    {after}\nos.rename = rename"
# Renames of the folder: the old one aside, the new one in.
RENAMES = {
    "before the first": AT_A_RENAME.format(before=f"if '.replaced-' in str(b): {KILL}", after="pass"),
    "between them": AT_A_RENAME.format(before="pass", after=f"if '.replaced-' in str(b): {KILL}"),
    "after the second": AT_A_RENAME.format(before="pass", after=f"if '.unfinished' in str(a): {KILL}"),
}


def merging(bench: Bench, *words: object) -> list[object]:
    """The words of a merge into out/."""
    named = ["--base_model", bench.model, "--lora_model", bench.adapter(), "--allow_other_base", "true"]
    return ["merge", *named, "--output_dir", bench.folder / "out", *words]


@fault(
    "merge and export over a project (.git, src, config.json), also with --overwrite_output_dir",
    "refused, nothing removed",
)
def project(bench: Bench) -> str:
    out = bench.folder / "out"
    for name in (".git/HEAD", "src/main.py", "config.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    bench.adapter()
    before = tree(bench.folder)
    commands: dict[str, list[object]] = {}
    for overwrite in ("false", "true"):
        words = merging(bench, "--overwrite_output_dir", overwrite)
        commands[f"merge {overwrite}"] = words
        commands[f"export {overwrite}"] = ["export", *words[1:]]
    for ended in bench.in_one_process(commands).values():
        ended.expect(2, "they are left alone")
        if "Pass --overwrite_output_dir" in ended.output:
            raise Lost("overwriting is advised")
    unchanged(before, bench.folder)
    return f"{len(commands)} times refused, nothing removed"


@fault("files put into output_dir while merge runs", "kept; the result next to them, named")
def came_meanwhile(bench: Bench) -> str:
    harm = "self.target.mkdir(); (self.target / 'notes.txt').write_text('mine')"
    ended = bench.qingtune(*merging(bench), spoil=AT_THE_SWITCH.format(harm=harm))
    ended.expect(2, "output_dir changed while the result was made: notes.txt", "out-2")
    if (bench.folder / "out" / "notes.txt").read_text() != "mine":
        raise Lost("the file is gone")
    whole(bench.folder / "out-2")
    return "kept; the merged model is in out-2, whole"


@fault("SIGTERM and SIGHUP while merge and export write", "exit 143 and 129, nothing left")
def ended_by_signals(bench: Bench) -> str:
    words = merging(bench)
    before = tree(bench.folder)
    for command, name in (("merge", "SIGTERM"), ("export", "SIGHUP")):
        harm = f"os.kill(os.getpid(), signal.{name}); time.sleep(30)"
        ended = bench.qingtune(command, *words[1:], spoil=AT_THE_SWITCH.format(harm=harm))
        ended.expect(128 + getattr(signal, name))
        unchanged(before, bench.folder)
        if left := [path.name for path in bench.folder.iterdir() if path.name.startswith((".", "out"))]:
            raise Lost(f"left: {left}")
    return "both unwound, nothing left"


@fault(
    "SIGKILL of merge --overwrite_output_dir at random moments, and at each rename",
    "old or new result whole; nothing else left after the next start",
)
def killed_while_replacing(bench: Bench) -> str:
    out = bench.folder / "out"
    words = merging(bench, "--overwrite_output_dir", "true")
    bench.qingtune(*words, "--save_dtype", "float32").expect(0)
    earlier, usual = tree(out), {path.name for path in bench.folder.iterdir()}
    later: dict[str, bytes] = {}

    def judge(when: str) -> None:
        places = [path for path in bench.folder.iterdir() if path == out or path.name.startswith("out.replaced-")]
        if not any(is_whole(place) for place in places):
            raise Lost(f"killed {when}: no whole result in {[path.name for path in places]}")
        bench.qingtune(*words, "--save_dtype", "float16").expect(0)
        later.update(later or tree(out))
        unchanged(later, out)
        if left := {path.name for path in bench.folder.iterdir()} - usual:
            raise Lost(f"killed {when}, left after the next start: {sorted(left)}")
        shutil.rmtree(out)
        for name, content in earlier.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(content)

    for when, spoil in RENAMES.items():
        ended = bench.qingtune(*words, "--save_dtype", "float16", spoil=spoil)
        if ended.code != -signal.SIGKILL:
            raise Lost(f"it was not killed {when}: {ended.code} {ended.output[-500:]}")
        judge(when)
    draw, tried = random.Random(11), max(bench.kills // 10, 1)
    for _ in range(tried):
        kill_while_staging(bench, [*words, "--save_dtype", "float16"], draw.random() * 0.5)
        judge("at random")
    return f"{len(RENAMES) + tried} kills; a whole result each time, and nothing next to it after the next start"


def kill_while_staging(bench: Bench, words: list[object], after_s: float) -> None:
    """SIGKILL a command some time after it began to write next to its place."""
    with subprocess.Popen(
        bench.python(*words), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not list(bench.folder.glob(".out-*.unfinished")):
            time.sleep(0.005)
        time.sleep(after_s)
        process.kill()


def is_whole(result: Path) -> bool:
    """Whether a result holds what its list says, as it says, and nothing else."""
    listed = Listed(result)
    return listed.maker == "merge" and all(listed.why_not(name) is None for name in looks_of(result))


def whole(result: Path) -> None:
    """Have a result be whole.

    Raises:
        Lost: it is not.
    """
    if not is_whole(result) or not (result / RESULT_FILES).exists():
        raise Lost(f"{result.name} is not whole")


@fault("infer with its input as output: the same path, a symlink, a hard link", "refused, input unchanged")
def input_as_output(bench: Bench) -> str:
    prompts = bench.folder / "prompts.jsonl"
    prompts.write_text('{"instruction": "hi"}\n' * 41)
    (bench.folder / "symlink.jsonl").symlink_to(prompts)
    os.link(prompts, bench.folder / "hardlink.jsonl")
    before = tree(bench.folder)
    asked = ["infer", "--base_model", bench.model, "--prompt_file", prompts, "--overwrite_output_file", "true"]
    names = ("prompts.jsonl", "symlink.jsonl", "hardlink.jsonl")
    commands = {name: [*asked, "--output_file", bench.folder / name] for name in names}
    for ended in bench.in_one_process(commands).values():
        ended.expect(2, "output_file would replace the prompt file")
    unchanged(before, bench.folder)
    return "refused by each name; unchanged"
