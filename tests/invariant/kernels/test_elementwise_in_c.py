"""Training with the elementwise work in C is training without it; and the C does nothing that sanitizers see."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from decoders import batches, decoded, make_decodable

from qingtune.kernels.native import elementwise as in_c

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
FOUND = in_c.elementwise_library()
pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("batch", ["common beginning of several blocks", "many samples"])
def test_losses_and_gradients_are_those_of_pytorch(
    batch: str, kind: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_c.native(torch.ones(1))
    model = make_decodable(kind, trained)
    loss, gradients = decoded(model, batches()[batch])
    monkeypatch.setattr(in_c, "elementwise", lambda: None)
    plain_loss, plain_gradients = decoded(model, batches()[batch])
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        bound = 1e-5 * float(plain_gradients[name].abs().max())  # of sums over tokens, in which numbers cancel
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(width: int, tmp_path: Path) -> None:
    """At three widths of vectors: the machine's own, and those of lesser CPUs where the machine has them."""
    assert COMPILER
    program, trivial = tmp_path / "driver", tmp_path / "trivial.c"
    trivial.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    vectors = (["-march=native"], ["-march=native", "-mno-avx512f"], [])[width]
    flags = [
        f'-DSOURCE="{in_c.SOURCE}"',
        "-std=c11",
        "-g1",
        "-O2",
        "-ftree-vectorize",
        "-fopenmp",
        *in_c.FLAGS,
        *vectors,
    ]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for file in (trivial, ROOT / "tests" / "elementwise_driver.c"):
        command = [COMPILER, *flags, str(file), "-o", str(program), "-lm"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if file == trivial and (made.returncode or subprocess.run([program], check=False).returncode):
            pytest.skip(f"no such compiler or sanitizer: {made.stderr[-200:]}")
        assert made.returncode == 0, made.stderr
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "3"}, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
