"""The machine and the processes of a run, as its report describes them."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import psutil

from qingtune.errors import UserError, shorten
from qingtune.machine.resources import processor, usable_cores

TORCHRUN = "torchrun --nproc_per_node 2 -m qingtune train ..."


def describe_machine() -> dict[str, Any]:
    """System, Python, processor, the cores that this process may use, and the machine's memory in bytes."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def launched_processes() -> int:
    """How many processes the launcher started, as torchrun does; 1 without one.

    Raises:
        UserError: a launcher's variable is no such number, or asks for a kind of parallelism that there is not.
    """
    _refuse_sharding()
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", -1)):
        value = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?\d{1,9}", value) or int(value) < least:
            raise UserError(
                f"{shorten(value)!r} is not a whole number of at least {least}",
                where=f"the environment variable {name}",
                fix=f"Unset it, or start the run with {TORCHRUN}.",
            )
    return int(os.environ.get("WORLD_SIZE", "1"))


_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_SIZES = {
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "sharded data parallelism",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
}


def _refuse_sharding() -> None:
    """Refuse what Accelerate's environment asks for and what would be silently ignored.

    Raises:
        UserError: names it.
    """
    asked = {name: kind for name, kind in _SHARDING.items() if _is_on(name)}
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked |= {name: kind for name, kind in _SIZES.items() if os.environ.get(name, "1") not in ("", "0", "1")}
    for name, kind in asked.items():
        raise UserError(
            f"{kind} is not supported: each process trains on its share of the samples",
            where=f"the environment variable {name}",
            fix=f"Turn {kind} off in Accelerate's configuration, or start the run with {TORCHRUN}; "
            "shard layers divides the model among the processes.",
        )


def _is_on(name: str) -> bool:
    """Whether an environment variable says yes, as Accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def describe_processes(count: int, *, sharded: bool = False) -> str | None:
    """A line on the processes that came: several, or fewer than a launcher was asked for; None for an ordinary one.

    sharded: whether the settings divide the model among them.
    """
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    asked = max(int(value) if (value := os.environ.get(name, "")).isdecimal() else 1 for name in names)
    if asked > count:
        return f"Warning: the launcher asked for {asked} processes, but this run has {count}. Use {TORCHRUN}."
    if count > 1:
        holds = "a part of each layer" if sharded else "the whole model"
        return f"Processes: {count}. Each holds {holds} and trains on its share of the samples."
    # With fewer than two GPUs, `accelerate launch --num_processes 2` sets an address to meet at and starts one process.
    if "MASTER_PORT" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "Warning: accelerate launch was asked for several processes, but started one, as it does on a machine with "
            f"fewer than two GPUs. Use {TORCHRUN}."
        )
    return None
