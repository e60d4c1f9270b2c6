"""Attack the commands with strangers' files and settings, and count what goes wrong, by class: `make attacks`.

python tools/attacks [--package FOLDER] [--only CLASS] [--case ID] [--seed 1] [--jobs 2] [--table FILE] [--bad FILE]
"""

from __future__ import annotations

import argparse
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import attack_list
from attack_case import Case
from attack_harness import FIXTURES, Result, Server, make_fixtures, new_server, remove, try_case

FEW = 30  # cases, below which only what they need is made, and commands import for themselves
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Try the cases, print what is bad of tried by class; 1 if anything is."""
    arguments = _parser().parse_args()
    cases = [case for case in attack_list.all_cases(arguments.seed) if _wanted(case, arguments)]
    if not cases:
        print("no such class or case; the classes are " + ", ".join(attack_list.GROUPS), file=sys.stderr)
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="attacks-"))
    began = time.monotonic()
    results = try_all(cases, Path(arguments.package).resolve(), scratch, arguments.jobs, keep=bool(arguments.case))
    table = as_table(results) + f"\n{len(results):,} cases in {time.monotonic() - began:.0f} s.\n"
    print(table)
    if arguments.table:
        Path(arguments.table).write_text(table, encoding="utf-8")
    if arguments.bad:
        Path(arguments.bad).write_text(as_list(results), encoding="utf-8")
    if arguments.case:
        show(results, scratch)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(any(result.verdict.bad for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default=str(ROOT), help="the checkout to attack (default: this one)")
    parser.add_argument("--only", help="classes whose name holds this")
    parser.add_argument("--case", help="cases whose id begins with this; their output is shown, their folders kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", help="write the table to this file")
    parser.add_argument("--bad", help="write a line for each bad case to this file")
    return parser


def _wanted(case: Case, arguments: argparse.Namespace) -> bool:
    if arguments.case:
        return case.identity.startswith(arguments.case)
    return not arguments.only or arguments.only in case.group


def try_all(cases: Sequence[Case], package: Path, scratch: Path, jobs: int, *, keep: bool = False) -> list[Result]:
    """Try cases, so many at a time; in the order of the cases."""
    fixtures = scratch / FIXTURES
    few = {name for case in cases for name in case.needs} if len(cases) < FEW else None
    modules = make_fixtures(package, fixtures, few)
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    results: dict[str, Result] = {}
    faults: list[BaseException] = []

    def work(number: int) -> None:
        server: Server | None = None
        try:
            server = new_server(package, scratch / f"server-{number}", modules)
            while not faults:
                case = waiting.get_nowait()
                folder = scratch / "cases" / f"{case.group}-{case.number}".replace(" ", "_")
                results[case.identity] = result = try_case(case, server, fixtures, folder)
                if result.verdict.bad:
                    print(f"bad: {case.identity}: {result.verdict.wrong[0]}", file=sys.stderr, flush=True)
                if not keep:
                    remove(folder)
        except queue.Empty:
            pass
        except BaseException as fault:  # raised by the main thread
            faults.append(fault)
        finally:
            if server is not None:
                server.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(max(1, min(jobs, len(cases))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return [results[case.identity] for case in cases]


def as_table(results: Sequence[Result]) -> str:
    """Bad of tried, by class, in Markdown."""
    lines = ["| class | tried | bad | seconds |", "|---|---|---|---|"]
    groups = list(dict.fromkeys(result.case.group for result in results))
    for group in groups:
        mine = [result for result in results if result.case.group == group]
        seconds = sum(result.seconds for result in mine)
        lines.append(f"| {group} | {len(mine)} | {sum(result.verdict.bad for result in mine)} | {seconds:.0f} |")
    bad = sum(result.verdict.bad for result in results)
    lines.append(f"| all | {len(results):,} | {bad:,} | {sum(result.seconds for result in results):.0f} |")
    return "\n".join(lines) + "\n"


def as_list(results: Sequence[Result]) -> str:
    """A line for each bad case: its id and all that is wrong."""
    bad = [result for result in results if result.verdict.bad]
    return "".join(f"- `{result.case.identity}`: {'; '.join(result.verdict.wrong)}\n" for result in bad)


def show(results: Sequence[Result], scratch: Path) -> None:
    """All that the commands of some cases said."""
    for result in results:
        print(f"=== {result.case.identity} ({result.case.expect}): {'; '.join(result.verdict.wrong) or 'well'}")
        for ended in result.ended:
            print(f"--- {' '.join(ended.argv)}\nexit code {ended.code}, {ended.cpu_s:.1f} s of computing")
            print(ended.shown.encode("ascii", "backslashreplace").decode().replace("\x1b", "\\x1b"))
    print(f"folders: {scratch}")


if __name__ == "__main__":
    sys.exit(main())
