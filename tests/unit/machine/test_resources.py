"""The machine as torch would find it, without torch: GPUs by nvidia-smi, CPUs by their flags, what is free."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qingtune.machine import resources
from qingtune.machine.resources import find_machine

SMI = "NVIDIA H100 80GB HBM3, 79000, 81559\nNVIDIA A10, with a comma, 20000, 23028\n"


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    asked = "--query-gpu=name,memory.free,memory.total --format=csv,noheader,nounits"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = '{asked}' ] || exit 9\ncat <<'END'\n{answer}END\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(resources.importlib.metadata, "version", lambda _: "2.13.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "name", "free"),
    [
        (None, "NVIDIA H100 80GB HBM3", 79000),
        ("0", "NVIDIA H100 80GB HBM3", 79000),
        ("1,0", "NVIDIA A10, with a comma", 20000),
        ("GPU-1234", "NVIDIA H100 80GB HBM3", 79000),
    ],
)
def test_the_first_gpu_that_may_be_seen_is_taken(
    visible: str | None, name: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, SMI)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = find_machine()
    assert (found.kind, found.name, found.free) == ("cuda", name, free * 2**20)
    assert found.total is not None
    assert found.total > free * 2**20


@pytest.mark.parametrize("visible", ["", "-1", "7", "x"])
def test_no_gpu_is_taken_where_none_may_be_seen(visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_machine().kind != "cuda"


@pytest.mark.parametrize(
    ("answer", "code"), [("", 0), (SMI, 9), ("No devices were found\n", 0), ("A, [N/A], [N/A]\n", 0)]
)
def test_a_broken_driver_is_no_gpu(answer: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, answer, code)
    assert find_machine().kind != "cuda"


def test_a_torch_for_cpus_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, SMI)
    monkeypatch.setattr(resources.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert find_machine().kind != "cuda"


@pytest.mark.parametrize(
    ("bf16", "fp16", "on_gpu", "on_cpu"),
    [(None, None, 2, 2), (False, None, 4, 4), (False, True, 2, 4), (True, None, 2, 2), (None, True, 2, 2)],
)
def test_the_number_format_is_that_of_a_run(
    bf16: bool | None, fp16: bool | None, on_gpu: int, on_cpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: False)
    monkeypatch.setattr(resources.sys, "platform", "linux")
    assert find_machine(bf16, fp16).itemsize == on_cpu
    fake_smi(tmp_path, monkeypatch, SMI)
    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: True)
    assert find_machine(bf16, fp16).itemsize == on_gpu


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "has_it"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("x86_64", "flags : fpu amx_bf16 amx_tile", True),
        ("x86_64", "flags : fpu avx2 avx512f\n", False),
        ("aarch64", "Features\t: fp asimd bf16 i8mm", True),
        ("aarch64", "Features : fp asimd", False),
        ("x86_64", "", False),
    ],
)  # fmt: skip
def test_cpus_are_known_by_their_flags(
    machine: str, cpuinfo: str, has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.sys, "platform", "linux")
    monkeypatch.setattr(resources.platform, "machine", lambda: machine)
    monkeypatch.setattr(resources.Path, "read_text", lambda _, encoding: cpuinfo)
    monkeypatch.delenv("QINGTUNE_CPU_WITHOUT", raising=False)
    assert resources.cpu_has_bf16() is has_it


@pytest.mark.parametrize(("without", "has_bf16"), [("avx512_bf16", True), ("avx512_bf16,amx_bf16", False), ("", True)])
def test_a_lesser_cpu_can_be_tried(without: str, has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.sys, "platform", "linux")
    monkeypatch.setattr(resources.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(resources.Path, "read_text", lambda _, encoding: "flags : avx512_vnni avx512_bf16 amx_bf16\n")
    monkeypatch.setenv("QINGTUNE_CPU_WITHOUT", without)
    assert resources.cpu_has_bf16() is has_bf16
    assert resources.cpu_has_int8_units()


@pytest.mark.parametrize(
    ("flags", "multiplies"),
    [
        ("avx2 avx512f avx512_vnni", True),
        ("avx2 amx_int8 avx512f", True),
        ("avx2 avx_vnni", True),
        ("avx2", True),
        ("avx2 avx512f", False),
        ("sse2", False),
    ],
)
def test_int8_is_multiplied_where_it_is_faster(flags: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(resources, "cpu_flags", lambda: set(flags.split()))
    assert resources.cpu_multiplies_int8() is multiplies


def test_other_systems_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.sys, "platform", "win32")
    assert resources.cpu_has_bf16() is False


AVAILABLE = 1000


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, AVAILABLE),
        ({"v2/memory.max": "900", "v2/memory.current": "200"}, 700),
        ({"v2/a/b/memory.max": "900\n", "v2/a/b/memory.current": "200\n"}, 700),
        ({"v2/a/memory.max": "800", "v2/a/memory.current": "300", "v2/a/b/memory.max": "max"}, 500),
        ({"v2/other/memory.max": "800", "v2/other/memory.current": "300"}, AVAILABLE),
        ({"v2/memory.max": "max", "v2/memory.current": "200"}, AVAILABLE),
        ({"v2/memory.max": "5000", "v2/memory.current": "200"}, AVAILABLE),
        ({"v2/memory.max": "900", "v2/memory.current": "950"}, 0),
        ({"v2/memory.max": "900"}, AVAILABLE),
        (
            {
                "v2/memory.max": "900", "v2/memory.current": "800",
                "v2/memory.stat": "anon 100\ninactive_file 300\nactive_file 250\n",
            },
            650,
        ),
        ({"v1/memory.limit_in_bytes": "800", "v1/memory.usage_in_bytes": "300"}, 500),
        ({"v1/c/memory.limit_in_bytes": "800", "v1/c/memory.usage_in_bytes": "300"}, 500),
        ({"v1/x/memory.limit_in_bytes": "800", "v1/x/memory.usage_in_bytes": "300"}, AVAILABLE),
        (
            {
                "v1/memory.limit_in_bytes": "800", "v1/memory.usage_in_bytes": "700",
                "v1/memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 50\n",
            },
            350,
        ),
        ({"v1/memory.limit_in_bytes": "9223372036854771712", "v1/memory.usage_in_bytes": "300"}, AVAILABLE),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_container_leaves(
    files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine").write_text("9:name=systemd:/x\n4:cpu,memory:/c\n0::/a/b\n")
    for name, place in (("_V1", "v1"), ("_V2", "v2"), ("_MY_GROUPS", "mine")):
        monkeypatch.setattr(resources, name, tmp_path / place)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))
    monkeypatch.setattr(resources, "_left_by_shell_limits", lambda: [])
    assert resources.free_ram_bytes() == free
