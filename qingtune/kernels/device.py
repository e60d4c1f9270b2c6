"""Device and number format, chosen by what the machine has; each choice comes with its reason."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from qingtune.errors import UserError, is_out_of_memory
from qingtune.machine.resources import cpu_has_bf16, cpu_has_int8_units, free_ram_bytes
from qingtune.output.units import counted


@dataclass(frozen=True)
class Hardware:
    """Where a run computes and in which dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_hardware(bf16: bool | None = None, fp16: bool | None = None, local_process: int = 0) -> Hardware:
    """Choose CUDA, MPS or CPU, and bf16, fp16 or fp32.

    Args:
        bf16: true asks for bfloat16, false rules it out, None leaves it to the hardware; likewise fp16.
        local_process: this process's number on this machine, which picks its GPU.
    """
    _limit_kernel_caches()
    device, name = _device(local_process)
    has_bf16, has_fp16 = _formats(device)
    wishes = {"bf16": (torch.bfloat16, bf16, has_bf16), "fp16": (torch.float16, fp16, has_fp16)}
    asked = next((dtype for dtype, wish, has in wishes.values() if wish and has), None)
    unmet = ""
    if bf16 and not has_bf16:
        unmet = "bf16 was requested, but this hardware only emulates it, slowly"
    elif fp16 and not has_fp16:
        unmet = "fp16 was requested, but training in fp16 needs an NVIDIA GPU"
    if asked:
        dtype, why = asked, "asked for"
    elif bf16 is None and has_bf16:
        dtype = torch.bfloat16
        why = f"{unmet}; bf16 is available and needs no loss scaling" if unmet else "the hardware supports it"
    elif fp16 is None and has_fp16 and not has_bf16:
        dtype, why = torch.float16, unmet or "the GPU is too old for bf16"
    else:
        off = [name for name, (_, wish, has) in wishes.items() if wish is False and has]
        off_reason = f"{' and '.join(off)} {'are' if len(off) > 1 else 'is'} off"
        dtype, why = torch.float32, unmet or (off_reason if off else "no fast 16-bit format here")
    return Hardware(device, dtype, f"{name}, {str(dtype).removeprefix('torch.')}: {why}")


def _limit_kernel_caches() -> None:
    """Keep oneDNN from holding on to the compiled code of every shape it ever met, 0.3 MB each; samples have many.

    Read once, at the first product; two caches of 1,024 each cost 1.5 GB after a few hundred passes, and one that
    holds the shapes of a layer, forward and backward, is as fast.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "48")


def _device(local_process: int) -> tuple[torch.device, str]:
    if torch.cuda.is_available():
        device = torch.device("cuda", local_process % torch.cuda.device_count())
        return device, f"GPU {torch.cuda.get_device_name(device)}"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"CPU, {counted(torch.get_num_threads(), 'thread')} (no GPU that torch can use)"


def _formats(device: torch.device) -> tuple[bool, bool]:
    """Whether bf16 and fp16 are fast and sound for training on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0), True
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0), False
    return cpu_has_bf16(), False


def has_int8_units(device: torch.device) -> bool:
    """Whether torch multiplies int8 matrices on this device at a multiple of the rate of 16-bit ones."""
    return device.type == "cpu" and cpu_has_int8_units()


def free_bytes(device: torch.device, *, swap: bool = False) -> int | None:
    """Memory that this process may still take, limits of a container or shell respected; None where unknown.

    swap: count free swap space, which keeps a process alive but is no place to compute in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_ram_bytes(swap=swap) if device.type == "cpu" else None


@contextmanager
def memory_errors(when: str, where: Path | None, fix: str) -> Generator[None]:
    """Report as a UserError "out of memory when ..."; where: a path to name, or None; fix: what takes less."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory when {when}", where=where and str(where), fix=fix) from error


def give_back_memory() -> None:
    """Have the C library give freed memory back to the system, which glibc else keeps in holes of its heap."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a GPU, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # getrusage's would begin with that of the process which started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on, so that a run's peak is not that of earlier work in the same process.

    On Linux freed memory goes back to the system first; macOS and Windows keep the peak of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        gc.collect()
        give_back_memory()
        with suppress(OSError):  # a kernel or a sandbox without it: the peak stays that of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets VmHWM, nothing else
