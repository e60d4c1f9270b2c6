"""The number format obeys the wishes as far as the device can, and the reason names what was not obeyed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import psutil
import pytest
import torch

from qingtune.kernels import device as hardware
from qingtune.kernels.device import choose_hardware
from qingtune.machine import resources

DEVICES = {
    "new GPU": ("cuda", True, True),
    "old GPU": ("cuda", False, True),
    "new CPU": ("cpu", True, False),
    "old CPU": ("cpu", False, False),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What comes of each pair of wishes: a format asked for where the device has it; never one that is ruled out; else bf16,
# else fp16 on a GPU too old for bf16, else fp32. Columns: new GPU, old GPU, new CPU, old CPU.
EXPECTED = {
    (None, None): (BF16, FP16, BF16, FP32),
    (None, True): (FP16, FP16, BF16, FP32),
    (None, False): (BF16, FP32, BF16, FP32),
    (True, None): (BF16, FP16, BF16, FP32),
    (True, False): (BF16, FP32, BF16, FP32),
    (False, None): (FP32, FP16, FP32, FP32),
    (False, True): (FP16, FP16, FP32, FP32),
    (False, False): (FP32, FP32, FP32, FP32),
}  # true and true is refused by the configuration


def choose(monkeypatch: pytest.MonkeyPatch, device: str, bf16: bool | None, fp16: bool | None) -> hardware.Hardware:
    kind, has_bf16, has_fp16 = DEVICES[device]
    monkeypatch.setattr(hardware, "_device", lambda _: (torch.device(kind), device))
    monkeypatch.setattr(hardware, "_formats", lambda _: (has_bf16, has_fp16))
    return choose_hardware(bf16, fp16)


@pytest.mark.parametrize(("bf16", "fp16"), EXPECTED)
@pytest.mark.parametrize("device", DEVICES)
def test_every_pair_of_wishes_on_every_device(
    device: str, bf16: bool | None, fp16: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose(monkeypatch, device, bf16, fp16)
    assert chosen.dtype == EXPECTED[bf16, fp16][list(DEVICES).index(device)]
    assert chosen.reason.startswith(f"{device}, {str(chosen.dtype).removeprefix('torch.')}: ")
    why = chosen.reason.split(": ", 1)[1]
    called_off = [
        name
        for name, wish, has in zip(("bf16", "fp16"), (bf16, fp16), DEVICES[device][1:], strict=True)
        if wish is False and has
    ]
    if chosen.dtype == FP32 and not (bf16 or fp16):
        off = f"{' and '.join(called_off)} {'are' if len(called_off) > 1 else 'is'} off"
        assert why == (off if called_off else "no fast 16-bit format here")
    else:
        assert " off" not in why
    if (bf16 and chosen.dtype == BF16) or (fp16 and chosen.dtype == FP16):
        assert why == "asked for"
    if bf16 and chosen.dtype != BF16:
        assert "bf16 was requested" in why or "for bf16" in why
    if fp16 and chosen.dtype != FP16:
        assert "fp16 was requested" in why


def test_each_process_gets_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    devices = [choose_hardware(local_process=number) for number in range(3)]
    assert [one.device for one in devices] == [torch.device("cuda", number) for number in (0, 1, 0)]
    assert devices[1].reason == "GPU Card 1, float16: the GPU is too old for bf16"


@pytest.mark.parametrize(
    ("capability", "formats"), [((7, 5), (False, True)), ((8, 0), (True, True)), ((9, 0), (True, True))]
)
def test_formats_of_gpus(
    capability: tuple[int, int], formats: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware._formats(torch.device("cuda", 0)) == formats


@pytest.mark.parametrize("has_it", [True, False])
def test_this_cpu(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has_it)
    chosen = choose_hardware()
    assert chosen.device == torch.device("cpu")
    assert chosen.dtype == (BF16 if has_it else FP32)
    assert "no GPU that torch can use" in chosen.reason


def test_peak_memory_is_that_of_this_process() -> None:
    before = hardware.peak_bytes(torch.device("cpu"))
    more = before - psutil.Process().memory_info().rss + 200 * 2**20
    block = torch.ones(more, dtype=torch.uint8)
    del block
    assert before + 150 * 2**20 < hardware.peak_bytes(torch.device("cpu")) < before + 250 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps a process's peak")
def test_peak_memory_is_that_of_a_run_and_not_of_what_came_before() -> None:
    cpu = torch.device("cpu")
    block = torch.ones(hardware.peak_bytes(cpu) - psutil.Process().memory_info().rss + 300 * 2**20, dtype=torch.uint8)
    before = hardware.peak_bytes(cpu)
    del block
    hardware.reset_peak(cpu)
    assert hardware.peak_bytes(cpu) < before - 250 * 2**20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    large = b"x" * (800 * 2**20)
    code = "import torch; from qingtune.kernels.device import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    assert int(run("-c", code).stdout) < len(large)


@pytest.mark.parametrize(
    ("device", "system", "machine", "flags", "has_them"),
    [
        ("cpu", "linux", "x86_64", "fpu avx512f avx512_vnni", True),
        ("cpu", "linux", "AMD64", "amx_tile amx_int8", True),
        ("cpu", "linux", "x86_64", "fpu avx2 avx_vnni avx512f", False),
        ("cpu", "linux", "aarch64", "asimd avx512_vnni i8mm", False),
        ("cpu", "win32", "x86_64", "avx512_vnni", False),
        ("cuda", "linux", "x86_64", "avx512_vnni", False),
    ],
)
def test_int8_units_are_known_by_their_flags(
    device: str, system: str, machine: str, flags: str, has_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QINGTUNE_CPU_WITHOUT", raising=False)
    monkeypatch.setattr(resources.sys, "platform", system)
    monkeypatch.setattr(resources.platform, "machine", lambda: machine)
    monkeypatch.setattr(resources.Path, "read_text", lambda _, encoding: f"processor : 0\nflags : {flags}\n")
    assert hardware.has_int8_units(torch.device(device)) is has_them


def test_a_limit_of_the_shell_is_respected(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import resource, torch; from qingtune.kernels.device import free_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (20 * 10**9, -1)); print(free_bytes(torch.device('cpu')))"
    )
    assert 0 < int(run("-c", code).stdout) < 20 * 10**9


def test_free_memory_of_other_devices_is_unknown() -> None:
    assert hardware.free_bytes(torch.device("mps")) is None
