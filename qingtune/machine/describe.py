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
        UserError: a launcher's variable is no such number.
    """
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", -1)):
        value = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?\d{1,9}", value) or int(value) < least:
            where, fix = (
                f"the environment variable {name}",
                "Unset it, or start the run with torchrun or accelerate launch.",
            )
            raise UserError(f"{shorten(value)!r} is no whole number of at least {least}", where=where, fix=fix)
    return int(os.environ.get("WORLD_SIZE", "1"))


def _processor() -> str:
    """Its name as sold, where the system tells it, else its architecture."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
