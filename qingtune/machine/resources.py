"""What this machine has, found without torch: free memory, GPUs, and what its CPU multiplies fast."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

DeviceKind = Literal["cpu", "cuda", "mps"]
ANSWER_WITHIN_S = 5.0


@dataclass(frozen=True)
class Machine:
    """Where a run would compute.

    Attributes:
        name: of the device.
        itemsize: bytes a number of the dtype that it would compute in.
        free: bytes that a run may take there; None where unknown. total: all that there is.
        free_with_swap: on a CPU, with free swap space.
        int8_units: whether int8 weights are multiplied as such.
        supposed: it is not this machine, and nothing was measured on it.
    """

    kind: DeviceKind
    name: str
    itemsize: int
    free: int | None
    total: int | None
    free_with_swap: int | None = None
    int8_units: bool = False
    supposed: bool = False

    @property
    def dtype(self) -> str:
        """16-bit or fp32; which of the 16-bit formats makes no difference in memory."""
        return "16-bit" if self.itemsize == 2 else "fp32"


def find_machine(bf16: bool | None = None, fp16: bool | None = None) -> Machine:
    """The device that a run would choose, and its number format, by hardware.choose_hardware's rules.

    Args:
        bf16: the setting; likewise fp16.
    """
    wide = bf16 is False and not fp16
    for name, free, total in _gpus() if _torch_has_cuda() else []:
        return Machine("cuda", name, 4 if wide else 2, free, total)
    ram = psutil.virtual_memory().total
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Machine("mps", "Apple GPU", 4 if wide else 2, free_ram_bytes(), ram)
    itemsize = 2 if cpu_has_bf16() and bf16 is not False else 4
    return Machine("cpu", cpu_name(), itemsize, free_ram_bytes(), ram, free_ram_bytes(swap=True), cpu_multiplies_int8())


def supposed_gpu(memory_gib: float) -> Machine:
    """An NVIDIA GPU that this machine lacks, with all its memory free."""
    total = round(memory_gib * 2**30)
    return Machine("cuda", f"a GPU of {memory_gib:g} GiB (not this machine)", 2, total, total, supposed=True)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _gpus() -> list[tuple[str, int, int]]:
    """Name, free and total bytes of each NVIDIA GPU that this process may see, by nvidia-smi."""
    query = ["--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        command = ["nvidia-smi", *query]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or none that answers: torch finds no GPU either
        return []
    found: list[tuple[str, int, int]] = []
    for line in answer.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 2))
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            found.append((name, int(numbers[0]) * 2**20, int(numbers[1]) * 2**20))
    return _visible(found)


def _visible(gpus: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, in its order, up to the first invalid one, as in CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return gpus
    chosen: list[tuple[str, int, int]] = []
    for number in named.split(","):
        if number.strip().upper().startswith(("GPU-", "MIG-")):
            return gpus  # by an identity that was not asked for; the first is as good a guess as any
        if not number.strip().isdigit() or int(number) >= len(gpus):
            break
        chosen.append(gpus[int(number)])
    return chosen


def _torch_has_cuda() -> bool:
    """Whether the installed torch is not a build for CPUs alone, by its version."""
    try:
        return "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return True


# --- CPU -------------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name as sold, if the system knows it, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def cpu_name() -> str:
    """The processor's name and how many of its cores may be used."""
    return f"{processor()}, {usable_cores()} cores"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; else it can be tens of times slower than fp32 (pytorch #146508)."""
    return bool(cpu_flags() & ({"avx512_bf16", "amx_bf16"} if _is_x86() else {"bf16"}))


def cpu_has_int8_units() -> bool:
    """Whether torch multiplies int8 matrices on this CPU at a multiple of the rate of 16-bit ones."""
    return _is_x86() and bool(cpu_flags() & {"avx512_vnni", "amx_int8"})


def cpu_multiplies_int8() -> bool:
    """Whether training multiplies int8 weights as such on this CPU: by its int8 units, or in C where it has AVX2 alone.

    With AVX-512 but without VNNI, products in fp32 are as fast.
    """
    return cpu_has_int8_units() or (_is_x86() and "avx2" in cpu_flags() and "avx512f" not in cpu_flags())


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def cpu_flags() -> set[str]:
    """What the CPU can do, by the names of Linux; empty on other systems.

    QINGTUNE_CPU_WITHOUT names flags to leave out, separated by commas, so that a lesser CPU can be tried on this one.
    """
    return set(_cpuinfo("flags", "features").split()) - hidden_cpu_flags()


def hidden_cpu_flags() -> set[str]:
    """What QINGTUNE_CPU_WITHOUT leaves out, whether or not the CPU has it."""
    return set(filter(None, os.environ.get("QINGTUNE_CPU_WITHOUT", "").split(",")))


def _cpuinfo(*names: str) -> str:
    """What Linux says of the first processor under one of these names; empty where it says nothing."""
    text = ""
    if sys.platform == "linux":
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip().lower() in names), "")


# --- Free memory -----------------------------------------------------------------------------------------------------


def free_ram_bytes(*, swap: bool = False) -> int:
    """Main memory that this process may still take, limits of a container or shell respected.

    Args:
        swap: count free swap space, which keeps a process alive but is no place to compute in.
    """
    machine = psutil.virtual_memory().available + (psutil.swap_memory().free if swap else 0)
    return max(0, min([machine, *_left_by_control_groups(), *_left_by_shell_limits()]))


def _left_by_control_groups() -> Iterator[int]:
    """What each control group that this process is in, and each one around it, may still take; versions 1 and 2.

    In a container the groups that /proc names may be invisible; the process's own group is then the root.
    """
    mine: dict[str, str] = {}
    with suppress(OSError):
        for line in _MY_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            mine |= dict.fromkeys(controllers.split(","), name)
    for controller, root, limit, used in (
        ("memory", _V1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("", _V2, "memory.max", "memory.current"),
    ):
        group = root / mine.get(controller, "/").lstrip("/")
        for place in (place for place in (group, *group.parents) if place.is_relative_to(root)):
            try:
                most, now = (int((place / name).read_text(encoding="utf-8")) for name in (limit, used))
            except (OSError, ValueError):  # no such control group, or its limit is "max"
                continue
            yield most - now + _cached_file_bytes(place)


def _cached_file_bytes(group: Path) -> int:
    """Pages of files, which count as used but are given up on demand."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    numbers = dict(line.split() for line in lines if len(line.split()) == 2)
    prefix = "total_" if "total_inactive_file" in numbers else ""
    return sum(int(numbers.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


_MY_GROUPS = Path("/proc/self/cgroup")
_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def _left_by_shell_limits() -> list[int]:
    """What `ulimit -v` leaves, where it is set."""
    if sys.platform == "win32":
        return []
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if most == resource.RLIM_INFINITY else [most - psutil.Process().memory_info().vms]
