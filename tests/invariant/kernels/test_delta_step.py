"""A gated delta net's new token in C gives what PyTorch's operations give, whatever the dtype, strides and threads."""

from __future__ import annotations

import pytest
import torch

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.delta.answer import DeltaCore
from qingtune.kernels.native import delta_step

SIZES = [DeltaNet(2, 6, 24, 40, 4), DeltaNet(1, 1, 8, 8, 2), DeltaNet(3, 3, 128, 128, 3)]


def core_of(sizes: DeltaNet) -> DeltaCore:
    channels = 2 * sizes.key_heads * sizes.key_size + sizes.value_heads * sizes.value_size
    heads = sizes.value_heads
    return DeltaCore(
        sizes, torch.randn(sizes.kernel, channels), -torch.rand(heads), torch.randn(heads) * 9,
        torch.randn(sizes.value_size), 1e-5,
    )  # fmt: skip


def tokens(core: DeltaCore, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values, z, b and a as parts of wider rows."""
    sizes, heads = core.sizes, core.sizes.value_heads
    parts = [core.taps.shape[1], heads * sizes.value_size, heads, heads]
    return list(torch.randn(count, sum(parts)).to(dtype).split(parts, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_c_is_pytorch(count: int, sizes: DeltaNet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    core = core_of(sizes)
    before = [torch.stack([part] * count) for part in core.new_states()]
    inputs = [tokens(core, count, dtype) for _ in range(5)]
    if not delta_step.fits(sizes, tuple(inputs[0]), (before[0], before[1])):
        pytest.skip("there is no C compiler")
    states = {kind: [part.clone() for part in before] for kind in ("C", "threads", "PyTorch")}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = [core.step(*token, *states["C"]) for token in inputs]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    threaded = [core.step(*token, *states["threads"]) for token in inputs]
    monkeypatch.setattr(delta_step, "fits", lambda *_: False)
    wanted = [core.step(*token, *states["PyTorch"]) for token in inputs]
    for mine, same, theirs in zip(found, threaded, wanted, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, same)
        assert float((mine - theirs).norm()) <= (1e-5 if dtype == torch.float32 else 2e-3) * float(theirs.norm())
    torch.testing.assert_close(states["C"], states["PyTorch"], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit() -> None:
    torch.manual_seed(0)
    core = core_of(SIZES[0])
    states = tuple(part[None] for part in core.new_states())
    halves = tuple(tokens(core, 1, torch.float16))
    assert not delta_step.fits(core.sizes, halves, states)
    large = DeltaNet(1, 1, 8, 1024, 2)
    assert not delta_step.fits(large, tuple(tokens(core_of(large), 1, torch.float32)), states)
