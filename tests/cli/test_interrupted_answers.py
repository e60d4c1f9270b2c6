"""Ctrl-C while a file of prompts is answered, in a real process: what is there stays, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_jsonl
from fork_server import ForkServer

from qingtune import cli
from qingtune.kernels import device

ROWS = 160
# In bf16 a sum may be rounded otherwise where other rows are answered beside; here each row's draws are to be its own.
IN_FP32 = """
import sys
from qingtune import cli
from qingtune.kernels import device
device.cpu_has_bf16 = lambda: False
sys.exit(cli.main())
"""
WITHIN_S = 120


@pytest.mark.skipif(sys.platform == "win32", reason="another kind of signal")
def test_answers_after_ctrl_c_are_those_of_a_run_in_one_go(
    tiny: Callable[..., Path], tmp_path: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Write {'a post ' * (n % 7)}{n}."} for n in range(ROWS)])
    flags = ["infer", "--base_model", str(tiny("qwen2")), "--prompt_file", str(prompts)]
    flags += ["--max_new_tokens", "24", "--temperature", "1"]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    command, log = ("-c", IN_FP32, *flags, "--output_file", broken), tmp_path / "log"
    with log.open("w") as file:
        streams = (subprocess.DEVNULL, subprocess.DEVNULL, file)
        process = fork_server.start(*command, streams=streams, CUDA_VISIBLE_DEVICES="")
    until = time.monotonic() + WITHIN_S
    while not broken.exists() or broken.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, err = process.wait(timeout=WITHIN_S), log.read_text()
    assert code == 130, err
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    kept = broken.read_bytes()
    done = kept.count(b"\n")
    assert 3 <= done < ROWS
    assert {"prompt", "answer", "answer_ended"} <= json.loads(kept.splitlines()[done - 1]).keys()

    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main([*flags, "--output_file", str(broken)]) == 0  # what is there matters, not which process goes on
    err = capsys.readouterr().err
    assert f"{done:,} answers are already written; resuming." in err
    assert f"{ROWS}/{ROWS}" in err
    assert cli.main([*flags, "--output_file", str(whole)]) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert broken.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert not list(tmp_path.glob("*.unfinished.json"))
