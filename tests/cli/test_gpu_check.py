"""tools/gpu_check.py, rehearsed on a CPU: every part runs, and a part that fails or takes too long stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_check

    return gpu_check


def test_all_parts_pass_when_rehearsed(tmp_path: Path, script: ModuleType) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--rehearse", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [result["part"] for result in results] == [*script.PARTS]
    assert all(result["rows"] for result in results)
    assert done.stdout.startswith("## versions: passed")


def test_a_part_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts.scale import Result, on_cpu

    output = tmp_path / "results.json"
    seen: list[int] = []

    def broken(_: Any) -> Result:
        raise ValueError("no such kernel")

    def hangs(_: Any) -> Result:
        time.sleep(30)
        return Result()

    def last(_: Any) -> Result:
        seen.append(len(json.loads(output.read_text(encoding="utf-8"))))
        return Result([{"tokens/s": 1234.5}], ["too slow"])

    monkeypatch.setattr(script, "PARTS", {"broken": (broken, 9), "hangs": (hangs, 1), "last": (last, 9)})
    scale = replace(on_cpu(tmp_path), patience=1)
    results = script.run_parts(["broken", "hangs", "last"], scale, output)
    assert [result["passed"] for result in results] == [False, False, False]
    assert results[0]["faults"] == ["ValueError: no such kernel"]
    assert results[1]["faults"] == ["OutOfTimeError: took longer than 1 s"]
    assert seen == [2]  # what was found before is on disk by then
    assert "| tokens/s |" in script.table(results)
    assert "- too slow" in script.table(results)


def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
