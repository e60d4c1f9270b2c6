"""Break runs in every way we know, with real processes, disks and files, and write docs/faults.md: `make faults`.

python tools/faults [--only WORD] [--kills 50]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import fault_console  # noqa: F401  # pyright: ignore[reportUnusedImport]  # each of these fills the list
import fault_outside  # noqa: F401  # pyright: ignore[reportUnusedImport]
import fault_results  # noqa: F401  # pyright: ignore[reportUnusedImport]
import fault_stops  # noqa: F401  # pyright: ignore[reportUnusedImport]
import fault_strangers  # noqa: F401  # pyright: ignore[reportUnusedImport]
from fault_harness import ROOT, Bench, Lost
from fault_list import FAULTS

REPORT = ROOT / "docs" / "faults.md"


def main() -> int:
    """Try all, print and write the table; 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="faults whose name holds this; docs/faults.md is then left as it is")
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
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

Made by `make faults` (tools/faults): real processes on a tiny model, killed, starved and fed with rubbish. "The
same, bit for bit" compares the final weights and metrics.jsonl with those of a run that nothing happened to. Links in
a run's folder: where a file would be written, the command is refused or the link itself is replaced; what a link leads
to is never written or removed.

"""

if __name__ == "__main__":
    sys.exit(main())
