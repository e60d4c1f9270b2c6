"""The machine that a run computes on, as its report tells it."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil

from qingtune.errors import UserError, shorten


def describe_machine() -> dict[str, Any]:
    """System, Python, processor, the cores that this process may use, and the machine's memory in bytes."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def launched_processes() -> int:
    """How many processes the launcher started, as torchrun does; 1 without one.

    Raises:
        UserError: a launcher's variable is no whole number.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not re.fullmatch(r"-?\d{1,9}", value):
            fix = "Unset it, or start the run with torchrun or accelerate launch."
            raise UserError(f"{shorten(value)!r} is no whole number", where=f"the environment variable {name}", fix=fix)
    return int(os.environ.get("WORLD_SIZE", "1"))


def _processor() -> str:
    """Its name as sold, where the system tells it, else its architecture."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
