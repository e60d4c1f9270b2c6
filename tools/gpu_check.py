"""Prove and measure the GPU path in ten minutes, part by part; each result is written as soon as it is there.

    python tools/gpu_check.py [--rehearse] [--only PART ...] [--output gpu_check.json]
    python tools/gpu_check.py --table gpu_check.json

One process runs the parts in order, each within a time limit, so that a run that is cut off still counts. --rehearse
runs all of it on a CPU with tiny sizes: it proves that the script works, not the GPU. --table prints a finished file
as Markdown, for docs/gpu.md. The exit code is 1 if a part failed or was outside its bounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_parts import answers, attention, counts, numbers, peers, processes, speed, stops, versions  # noqa: E402
from gpu_parts.scale import Result, Scale, on_cpu, on_gpu  # noqa: E402

from qingtune.files.write import write_text  # noqa: E402

Part = Callable[[Scale], Result]
# What runs, in this order, and the seconds that each may take on a GPU.
PARTS: dict[str, tuple[Part, int]] = {
    "versions": (versions.part, 20),
    "attention": (attention.part, 40),
    "numbers": (numbers.part, 90),
    "counts": (counts.part, 40),
    "speed": (speed.small, 100),
    "speed_7b": (speed.large, 120),
    "peers": (peers.part, 60),
    "resume": (stops.resume, 60),
    "out_of_memory": (stops.out_of_memory, 20),
    "answers": (answers.part, 60),
    "processes": (processes.part, 60),
}


class OutOfTimeError(Exception):
    """A part took longer than it may."""


def main() -> int:
    """Run the parts; 1 if one of them failed."""
    arguments = _arguments()
    if arguments.table:
        print(table(json.loads(Path(arguments.table).read_text(encoding="utf-8"))))
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        scale = on_cpu(scratch) if arguments.rehearse else on_gpu(scratch)
        if scale is None:
            print("torch sees no NVIDIA GPU here; --rehearse runs the same on a CPU.", file=sys.stderr)
            return 2
        results = run_parts(arguments.only or [*PARTS], scale, Path(arguments.output))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(results))
    return int(any(not result["passed"] for result in results))


def run_parts(names: list[str], scale: Scale, output: Path) -> list[dict[str, Any]]:
    """The results of the parts in order; the file holds those that there are at any time."""
    results: list[dict[str, Any]] = []
    for name in names:
        part, seconds = PARTS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append({"part": name, **_run(part, scale, seconds * scale.patience)})
        write_text(output, json.dumps(results, indent=1) + "\n")
        now = results[-1]
        print(f"{name}: {'passed' if now['passed'] else 'FAILED'} in {now['seconds']} s", file=sys.stderr, flush=True)
    return results


def _run(part: Part, scale: Scale, seconds: int) -> dict[str, Any]:
    """A part's result, or the error that ended it; the next part begins with an empty device either way."""
    began = time.perf_counter()
    try:
        with _limited(seconds):
            result = part(scale)
        found: dict[str, Any] = {"passed": not result.faults, "faults": result.faults, "rows": result.rows}
    except Exception as error:
        traceback.print_exc()
        found = {"passed": False, "faults": [f"{type(error).__name__}: {error}"[:400]], "rows": []}
    scale.clear()
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


@contextmanager
def _limited(seconds: int) -> Generator[None]:
    """Raise OutOfTimeError within the block when the seconds are over."""

    def stop(_: int, __: Any) -> None:
        raise OutOfTimeError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(results: list[dict[str, Any]]) -> str:
    """Each part's rows as Markdown."""
    lines: list[str] = []
    for result in results:
        lines += [f"## {result['part']}: {'passed' if result['passed'] else 'failed'}, {result['seconds']} s", ""]
        lines += [f"- {fault}" for fault in result["faults"]] + [""] * bool(result["faults"])
        names = [*dict.fromkeys(name for row in result["rows"] for name in row)]
        if names:
            lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
            lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in names)} |" for row in result["rows"]]
            lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", default="gpu_check.json", help="the results, written after each part")
    parser.add_argument("--table", metavar="FILE", help="print such a file as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
