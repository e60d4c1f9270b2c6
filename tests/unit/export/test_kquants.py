"""llama.cpp's quantiser works in a process of its own, which ends when the command does, and whose faults are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_twin import copy_gguf, random_blocks

from qingtune.errors import UserError
from qingtune.export import kquants
from qingtune.export.gguf_file import K_QUANTS, MOST_ERROR, GGUFPlan, check_gguf, write_gguf
from qingtune.export.gguf_layout import layout_of
from qingtune.export.kquants import quantize_gguf, require_quantizer
from qingtune.models.stored_weights import StoredWeights

Read = Callable[[str], torch.Tensor]
FORMS = [Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.Q4_0, Kind.Q8_0, Kind.IQ4_NL]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts a program in the place of the quantiser's process."""

    def stand_in(text: str) -> None:
        path = tmp_path / "stand_in.py"
        path.write_text(f"import os, sys, time\n{text}\n")
        monkeypatch.setattr(kquants, "SCRIPT", path)

    return stand_in


def test_without_llama_cpp_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"not installed\. Run `pip install llama-cpp-python==[\d.]+`"):
        require_quantizer()
    extras = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'kquants = ["{kquants.REQUIREMENT}"]' in extras


def test_the_process_is_given_what_to_do_and_its_progress_is_reported(
    script: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: Callable[[], list[str]]
) -> None:
    script("print(3, 290)\nopen(sys.argv[2], 'w').write(' '.join(sys.argv[1:2] + sys.argv[3:]))")
    monkeypatch.setattr(kquants, "_SAY_EVERY_S", -1.0)
    quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", 7)
    assert (tmp_path / "b.gguf").read_text() == f"{tmp_path / 'a.gguf'} Q4_K_M 7"
    assert reported() == ["Quantising: 3 of 290 tensors"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("sys.exit('load: bad magic\\nquantize: unsupported')", "quantize: unsupported"),
        ("sys.exit(3)", "ended with 3"),
        ("os.kill(os.getpid(), 11)", "ended with -11"),
    ],
)
def test_a_failure_is_told_in_a_line(program: str, reason: str, script: Callable[[str], None], tmp_path: Path) -> None:
    script(program)
    with pytest.raises(UserError, match=rf"llama.cpp could not make b.gguf: .*{reason}.* --quantize q8_0"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", 1)


def test_a_full_disk_is_told_as_such(
    script: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("sys.exit('iostream error')")
    monkeypatch.setattr(kquants, "_FULL", 1 << 62)
    with pytest.raises(OSError, match=r"No space left on device: .*b\.gguf"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", 1)


def test_ctrl_c_ends_the_process(
    script: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("print(1, 2, flush=True)\ntime.sleep(100)")
    started: list[subprocess.Popen[str]] = []

    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "1 2\n"
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(kquants, "_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", 1)
    assert started[0].poll() is not None


# --- What is read back -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> tuple[GGUFPlan, Read]:
    """A tiny llama whose rows divide into blocks of 256, as a plan for the file that is quantised."""
    make_model("llama", hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    weights = StoredWeights(tmp_path)
    layout = layout_of(tmp_path, weights.shapes)
    return GGUFPlan(layout, {"general.name": "tiny", **layout.metadata}, "bf16"), weights.read


@pytest.mark.parametrize("kind", FORMS)
def test_a_file_that_llama_cpp_made_is_compared_with_the_weights(
    kind: Kind, model: tuple[GGUFPlan, Read], tmp_path: Path
) -> None:
    plan, _ = model
    write_gguf(tmp_path / "a.gguf", plan, model[1])
    stored = {
        tensor.name: random_blocks(kind, *tensor.shape) for tensor in plan.layout.tensors if len(tensor.shape) > 1
    }

    def encode(name: str, numbers: Any) -> tuple[Any, Kind]:
        return (stored[name], kind) if name in stored else (numbers, Kind.F32)

    copy_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", encode)
    noise = np.random.default_rng(0)
    size = MOST_ERROR[kind] / 2
    wrong = {"blk.1.ffn_down.weight": 0.0}

    def read(source: str) -> torch.Tensor:
        (tensor,) = (tensor for tensor in plan.layout.tensors if tensor.source == source)
        if tensor.name not in stored:
            return model[1](source)
        numbers = dequantize(stored[tensor.name], kind)
        numbers = numbers + noise.normal(size=numbers.shape) * size * np.sqrt(np.mean(numbers**2))
        numbers = torch.from_numpy(numbers.astype(np.float32)) * (1 + wrong.get(tensor.name, 0.0))
        return numbers if tensor.rows is None else numbers[tensor.rows.index().argsort()]

    made = GGUFPlan(plan.layout, plan.metadata, "q4_k_m")
    kept = check_gguf(tmp_path / "b.gguf", made, read)
    assert kept[kind.name].tensors == len(stored)
    assert kept[kind.name].error == pytest.approx(size / np.hypot(1, size), rel=0.1)
    assert (kept["F32"].tensors, kept["F32"].error) == (len(plan.layout.tensors) - len(stored), 0)
    wrong["blk.1.ffn_down.weight"] = 1.0
    with pytest.raises(UserError, match=rf"down_proj.weight stored as {kind.name} differs by"):
        check_gguf(tmp_path / "b.gguf", made, read)


@pytest.mark.parametrize("form", K_QUANTS)
def test_rows_that_do_not_divide_are_known_before(form: str, model: tuple[GGUFPlan, Read], tmp_path: Path) -> None:
    assert GGUFPlan(model[0].layout, {}, form).undivided == []
    make_model("qwen2", hidden_size=224, intermediate_size=512).save_pretrained(tmp_path)
    layout = layout_of(tmp_path, StoredWeights(tmp_path).shapes)
    undivided = GGUFPlan(layout, {}, form).undivided
    assert "blk.0.attn_q.weight" in undivided
    assert "blk.0.ffn_down.weight" not in undivided
    assert "blk.0.attn_q.bias" not in undivided


# --- With llama.cpp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", K_QUANTS)
def test_llama_cpp_makes_what_was_asked_for(form: str, model: tuple[GGUFPlan, Read], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    plan, read = model
    write_gguf(tmp_path / "a.gguf", plan, read)
    quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", form, 1)
    kept = check_gguf(tmp_path / "b.gguf", GGUFPlan(plan.layout, plan.metadata, form), read)
    main = f"Q{form[1]}_K"
    assert max(kept, key=lambda kind: kept[kind].tensors) == main
    assert kept[main].error == pytest.approx({"3": 0.15, "4": 0.071, "5": 0.036, "6": 0.018}[form[1]], rel=0.1)
    largest = max(MOST_ERROR[tensor.tensor_type] for tensor in GGUFReader(tmp_path / "b.gguf").tensors)
    assert largest == MOST_ERROR[Kind[main]]


def test_llama_cpps_own_refusal_is_passed_on(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "a.gguf").write_bytes(b"GGUF rest")
    with pytest.raises(UserError, match=r"could not make b\.gguf: .*(load|quantize)"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", 1)
