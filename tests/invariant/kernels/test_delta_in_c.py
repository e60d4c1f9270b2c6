"""What delta_rule.c gives does not depend on how many threads there are, and sanitizers see nothing in it.

That it gives what Transformers gives is in test_delta_net.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from sanitized_driver import COMPILER, check_driver

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.layout import Layout, Segment
from qingtune.kernels.native import delta_rule
from qingtune.kernels.native.delta import FLAGS
from qingtune.machine.resources import cpu_flags

HIDDEN = os.environ.get("QINGTUNE_NATIVE") == "0" or not {"avx2", "fma"} <= cpu_flags()
pytestmark = pytest.mark.skipif(
    COMPILER is None or HIDDEN, reason="no C compiler, QINGTUNE_NATIVE=0, or a CPU without AVX2"
)


def outputs(this: DeltaNet, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of both directions, on two samples that share a beginning."""
    generator = torch.Generator().manual_seed(0)
    kernels, segments = delta_rule.compiled(), (Segment(0, 70, 0), Segment(70, 71, 70), Segment(71, 200, 70))
    assert kernels
    tokens, values = 200, this.value_heads * this.value_size
    channels = 2 * this.key_heads * this.key_size + values

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    qkv, taps = numbers(tokens, channels).to(dtype), numbers(this.kernel, channels)
    decay, beta = (numbers(this.key_heads, this.value_heads // this.key_heads, tokens) for _ in range(2))
    states = torch.empty(1 + tokens // 64, this.value_heads, this.key_size, this.value_size, dtype=dtype)
    places = torch.arange(tokens)
    layout = Layout(places, places, segments, places, places)
    given = delta_rule.Given(this, layout, qkv, taps, -decay.abs(), beta.sigmoid(), states, 1e-6)
    out, grad_qkv, grad_taps = torch.empty(tokens, values, dtype=dtype), torch.empty_like(qkv), torch.zeros_like(taps)
    kernels.forward(given, out)
    grads = kernels.backward(given, numbers(tokens, values).to(dtype), grad_qkv, grad_taps)
    return [out, states, grad_qkv, grad_taps, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    this, threads = DeltaNet(3, 6, 32, 16, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = outputs(this, dtype)
        torch.set_num_threads(3)
        found = outputs(this, dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_which_tensors_it_takes() -> None:
    this, rows = DeltaNet(2, 2, 16, 32, 4), torch.ones(2, 16)
    assert delta_rule.delta_rule(this, rows)
    assert not delta_rule.delta_rule(this, rows.double())
    assert not delta_rule.delta_rule(this, rows, rows.bfloat16())
    assert not delta_rule.delta_rule(this, rows.t())
    assert not delta_rule.delta_rule(DeltaNet(2, 2, 12, 32, 4), rows)
    assert not delta_rule.delta_rule(DeltaNet(2, 2, 16, 1024, 4), rows)
    assert not delta_rule.delta_rule(DeltaNet(2, 2, 16, 32, 17), rows)


@pytest.mark.parametrize("avx512", [True, False])
def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(avx512: bool, tmp_path: Path) -> None:
    check_driver("delta_driver.c", delta_rule.SOURCE, FLAGS, tmp_path, avx512=avx512)
