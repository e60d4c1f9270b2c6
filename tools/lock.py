"""Write requirements_lock.txt: every package that an installation brings, at one version, with the hashes of its files.

Needs uv (`make lock` installs it). torch and the GPU libraries that its Linux build brings are left out: which build of
torch is right differs by machine, and a hash would forbid all others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements_lock.txt"
HEADER = """\
# Made from requirements_stable.txt by `make lock`; do not edit. To install just these files, for Python 3.10 and newer:
#   pip install torch==2.13.0
#   pip install --require-hashes --no-deps -r requirements_lock.txt
"""
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def main() -> int:
    """Have uv resolve the requirements for all platforms, and write what is not torch's."""
    command = [
        "uv", "pip", "compile", "requirements_stable.txt", "--universal", "--python-version", "3.10",
        "--generate-hashes", "--no-header", "--no-annotate", "--quiet",
    ]  # fmt: skip
    resolved = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    entries = re.split(r"(?m)^(?=\S)", resolved)
    LOCK.write_text(HEADER + "".join(entry for entry in entries if not OF_TORCH.match(entry)), encoding="utf-8")
    print(f"wrote {LOCK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
