"""A disk that takes no more: the export says so, and leaves nothing."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_train_to_merge import call

from qingtune.export.gguf_file import _append

FULL = Path("/dev/full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB; the tiny model takes about half of it in fp32."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs Linux and root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("filler", [200, 240, 280, 292, 296])
def test_export_says_that_the_disk_is_full(filler: int, small_disk: Path, tiny: Callable[..., Path]) -> None:
    (small_disk / "filler").write_bytes(bytes(filler * 1000))
    flags = ("--quantize", "f32", "--output_dir", small_disk / "out")
    code, out, err = call("export", "--base_model", tiny("llama"), *flags)
    assert (code, out) == (2, "")
    assert "No space left on device" in err
    assert "Free disk space, or choose another output_dir." in err
    assert "Traceback" not in err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_the_reason_is_the_systems_own(size: int) -> None:
    with pytest.raises(OSError, match="No space left") as error, FULL.open("wb") as file:
        _append(file, np.zeros((1, size), np.uint8), 32)
    assert error.value.errno == errno.ENOSPC
