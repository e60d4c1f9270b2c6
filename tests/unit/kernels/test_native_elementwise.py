"""The elementwise work in C gives what PyTorch gives, on hard inputs too, and the same for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from qingtune.kernels.elementwise import Norm, rotate, swiglu, swiglu_backward
from qingtune.kernels.int8 import quantize_rows
from qingtune.kernels.linear import Int8Linear
from qingtune.kernels.loss import _RunningSoftmax, _softmax_minus_one_hot
from qingtune.kernels.native import elementwise as in_c
from qingtune.kernels.workspace import Workspace

FOUND = in_c.elementwise_library()
pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))

EPSILON = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# One row, one column, sizes around the width of vectors, enough for two threads.
SHAPES = [(1, 1), (1, 64), (3, 5), (2, 17), (7, 31), (5, 33), (640, 67)]
Result = tuple[torch.Tensor, ...]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def plain(work: Callable[[], Result]) -> Result:
    """What PyTorch gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_c, "elementwise", lambda: None)
        return work()


def compare(work: Callable[[], Result], dtype: torch.dtype) -> None:
    """fp32: 1e-6 of the largest number; bf16: that PyTorch rounds in between makes up to two of its steps."""
    assert in_c.native(torch.ones(1, dtype=dtype)) is not None
    for mine, twin in zip(work(), plain(work), strict=True):
        assert mine.dtype == twin.dtype
        assert mine.isnan().equal(twin.isnan())
        infinite = twin.isinf() | mine.isinf()
        assert mine[infinite].equal(twin[infinite])
        mine, twin = (torch.where(twin.isfinite(), x, 0).double() for x in (mine, twin))
        bound = twin.abs() * 2**-7 if dtype == torch.bfloat16 and mine.dim() else 0.0
        assert bool(((mine - twin).abs() <= bound + 1e-6 * twin.abs().amax().clamp_min(1)).all())


def hard(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random numbers of many sizes; a row of zeros, one with infinity, one with no number, where there are rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    if len(x) > 4:
        x[1], x[2, 0], x[3, -1] = 0, torch.inf if seed % 2 else -torch.inf, torch.nan
    return x.to(dtype)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [False, True])
def test_norms(shape: tuple[int, int], dtype: torch.dtype, trained: bool, threads: int) -> None:
    x, grad, total = (hard(shape, dtype, seed) for seed in (0, 1, 2))
    if trained:
        x, grad = (torch.where(t.isfinite(), t, 1) for t in (x, grad))

    def work() -> Result:
        weight = torch.linspace(-1, 2, shape[1]).to(dtype).requires_grad_(trained)
        norm = Norm(weight, EPSILON, Workspace(x.device))
        with torch.no_grad():
            out = norm.forward(x), norm.backward(grad, x).clone(), norm.add_backward(total.clone(), grad, x)
        return out if weight.grad is None else (*out, weight.grad)

    compare(work, dtype)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    def work() -> Result:
        gate, up, grad = (hard(shape, dtype, seed) for seed in (0, 1, 2))
        gate.view(-1)[-1:] = -1e4
        activated = torch.empty_like(gate)
        out = swiglu(gate, up, activated, torch.empty_like(gate))
        return out, swiglu_backward(grad, gate, up, activated), gate

    if dtype == torch.float32:
        compare(work, dtype)
        return
    for mine, twin in zip(work(), plain(work), strict=True):  # PyTorch's sums cancel in bf16: within its steps
        torch.testing.assert_close(mine, twin, rtol=2**-6, atol=2**-6, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (3, 11_000)])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_accumulation_in_fp32(shape: tuple[int, int], dtype: torch.dtype, factor: float, threads: int) -> None:
    part, total = hard(shape, dtype), hard(shape, torch.float32, 1)
    c, mine = in_c.native(part), total.clone()
    assert c
    c.accumulate(part, factor, mine)
    twin = total + factor * part.float()
    torch.testing.assert_close(
        mine, twin, rtol=0 if factor == 1 else 1e-6, atol=0 if factor == 1 else 1e-6, equal_nan=True
    )


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_and_their_gradients_are_those_of_autograd(activation: in_c.Activation, dtype: torch.dtype) -> None:
    gate, up, grad = (torch.randn(7, 33).mul(3).to(dtype) for _ in range(3))
    wide = [x.double().requires_grad_() for x in (gate, up)]
    activated = F.silu(wide[0]) if activation == "silu" else F.gelu(wide[0], approximate="tanh")
    twins = torch.autograd.grad(activated * wide[1], wide, grad.double())
    c, out, grad_up = in_c.native(gate), torch.empty_like(gate), torch.empty_like(gate)
    assert c
    c.gated(gate, up, out, activation=activation)
    c.gated_backward(grad, gate, up, grad_up, activation=activation)
    for mine, twin in zip((out, gate, grad_up), ((activated * wide[1]).detach(), *twins), strict=True):
        torch.testing.assert_close(mine.double(), twin, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize(("rows", "heads", "half"), [(1, 1, 1), (5, 3, 7), (64, 14, 32)])
def test_rotation(rows: int, heads: int, half: int, dtype: torch.dtype, threads: int) -> None:
    x, angles = hard((rows, heads, 2 * half), dtype), torch.rand(rows, 1, half) * 50
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def work() -> Result:
        return (rotate(x, cos, sin, torch.empty_like(x)),)

    if dtype == torch.float32:
        compare(work, dtype)
        return
    largest = float(torch.where(x.isfinite(), x, 0).abs().max())  # where numbers cancel, PyTorch has rounded before
    torch.testing.assert_close(work(), plain(work), rtol=0.02, atol=0.02 * largest, equal_nan=True)


@DTYPES
def test_heads_with_gaps_between_them(dtype: torch.dtype) -> None:
    """As queries next to their gates, or of a layer that gives keys and values too."""
    rows, heads, size, half = 6, 3, 20, 8
    angles = torch.rand(rows, 1, half) * 50
    cos, sin, weight = angles.cos().to(dtype), angles.sin().to(dtype), torch.linspace(-1, 2, size).requires_grad_()
    together, grad = torch.randn(rows, 5 * heads * size).to(dtype), torch.randn(rows, heads, size).to(dtype)
    next_to_gates = together[:, : 2 * heads * size].view(rows, heads, 2, size)[:, :, 0]
    for x in (next_to_gates, together[:, size : (1 + heads) * size].unflatten(1, (heads, size))):
        assert in_c.native(x) is None
        assert in_c.native(grad, heads=x) is not None
        results: list[list[torch.Tensor]] = []
        for mine in (x, x.contiguous()):
            weight.grad, norm = None, Norm(weight, EPSILON, Workspace(x.device))
            with torch.no_grad():
                found = [norm.forward(mine), norm.backward(grad, mine), rotate(mine, cos, sin, torch.empty_like(grad))]
            assert weight.grad is not None
            results.append([*found, weight.grad])
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert in_c.native(grad, heads=together.view(rows, heads, -1)[..., ::5]) is None


def test_a_part_of_a_head_turns_in_place() -> None:
    x, angles = torch.randn(5, 2, 12), torch.rand(5, 1, 4)
    twin = torch.cat([rotate(x[..., :8].contiguous(), angles.cos(), angles.sin(), torch.empty(5, 2, 8)), x[..., 8:]], 2)
    c = in_c.native(x)
    assert c
    c.rotate(x, angles.cos(), angles.sin(), x)
    torch.testing.assert_close(x, twin, rtol=0, atol=0)


def test_a_norm_with_an_offset_on_its_weight() -> None:
    x, grad, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    c, out, grad_x, total = in_c.native(x), torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    assert c
    c.norm(x, weight, EPSILON, out, offset=1.0)
    c.norm_backward(grad, x, weight, EPSILON, grad_x, offset=1.0)
    c.norm_add_backward(grad, x, weight, EPSILON, total, offset=1.0)
    norm = Norm(1 + weight, EPSILON, Workspace(x.device))
    for mine, twin in ((out, norm.forward(x)), (grad_x, norm.backward(grad, x)), (total, norm.backward(grad, x) + 1)):
        torch.testing.assert_close(mine, twin)


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 31), (9, 4096), (6, 9001)])
def test_cross_entropy(shape: tuple[int, int], scale: float | None, dtype: torch.dtype, threads: int) -> None:
    logits, targets = hard(shape, dtype) * 4, torch.arange(shape[0]) * 7 % shape[1]
    factor = None if scale is None else torch.tensor(scale)

    def work() -> Result:
        workspace, losses, gradients = Workspace(logits.device), [], []
        for row, target in zip(logits.split(1), targets.split(1), strict=True):
            grad = row.clone()
            losses.append(_softmax_minus_one_hot(grad, target, factor, workspace))
            gradients.append(grad)
        return torch.stack(losses), torch.cat(gradients)

    compare(work, dtype)
    together = logits.clone()
    _softmax_minus_one_hot(together, targets, factor, Workspace(logits.device))
    torch.testing.assert_close(together, work()[1], rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("tile", [1, 7, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (9, 4097)])
def test_a_running_softmax(shape: tuple[int, int], tile: int, dtype: torch.dtype, threads: int) -> None:
    tile = max(tile, shape[1] // 40)
    logits, targets = hard(shape, dtype) * 4, torch.arange(shape[0]) * 7 % shape[1]

    def work() -> Result:
        running = _RunningSoftmax(targets, torch.float32, Workspace(logits.device))
        total = torch.zeros(shape[0], 3)
        for first in range(0, shape[1], tile):
            part = logits[:, first : first + tile].clone(memory_format=torch.contiguous_format)
            running.take(part, first)
            running.accumulate(total, part.float().sum(1, keepdim=True).expand(-1, 3).to(dtype).contiguous())
        return *running.result(), running.rest, total

    compare(work, torch.float32 if tile == 1 else dtype)  # sums of several numbers are rounded
    losses = work()[1]
    assert losses.shape == (shape[0],)
    torch.testing.assert_close(
        losses, F.cross_entropy(logits.float(), targets, reduction="none"), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("size", [1, 12288])
def test_a_probability_of_one_and_far_logits(size: int) -> None:
    logits = torch.full((2, size + 1), -3e4)
    logits[:, 0] = 3e4
    c = in_c.native(logits)
    assert c
    assert c.cross_entropy(logits, torch.tensor([0, size]), 1.0).tolist() == [0.0, 6e4]
    assert logits[0].abs().max() == 0
    assert logits[1].tolist() == [1.0, *[0.0] * (size - 1), -1.0]


@DTYPES
@pytest.mark.parametrize(("heads", "rows", "keys"), [(1, 1, 1), (2, 3, 5), (3, 7, 33), (8, 40, 130)])
def test_softmax_of_what_a_row_sees(heads: int, rows: int, keys: int, dtype: torch.dtype, threads: int) -> None:
    scores = torch.randn(heads, rows, keys).mul(4).to(dtype)
    begins = torch.arange(rows) % keys // 2
    ends = (keys - rows + 1 + torch.arange(rows)).clamp(min=1).maximum(begins + 1)
    places = torch.arange(keys)
    unseen = (places < begins[:, None]) | (places >= ends[:, None])
    scores[:, unseen] = torch.nan  # what is not seen does not matter
    twin = scores.double().masked_fill(unseen, -torch.inf).softmax(-1)
    c, shares = in_c.native(scores), torch.full_like(scores, torch.nan)
    assert c
    c.softmax(scores, torch.stack([begins, ends]), shares)
    torch.testing.assert_close(shares.double(), twin, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert shares[:, unseen].abs().sum() == 0


def test_softmax_of_hard_scores() -> None:
    scores = torch.tensor([[torch.inf, 0], [-torch.inf, 0], [torch.nan, 0], [-torch.inf, -torch.inf], [3e4, -3e4]])
    c, shares = in_c.native(scores), torch.empty_like(scores)
    assert c
    c.softmax(scores, torch.tensor([[0] * 5, [2] * 5]), shares)
    torch.testing.assert_close(shares, scores.softmax(-1), rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_int8(shape: tuple[int, int], scaled: bool, dtype: torch.dtype, threads: int) -> None:
    x = torch.where((x := hard(shape, dtype)).isfinite(), x, 0)
    columns = torch.linspace(0.5, 2, shape[1]) if scaled else None

    def work() -> Result:
        return quantize_rows(x, columns, Workspace(x.device), "x")

    (packed, scales), (twin, twin_scales) = work(), plain(work)
    torch.testing.assert_close(scales, twin_scales)
    assert (packed.int() - twin.int()).abs().max() <= 1  # halves may be rounded to either side
    assert (packed != twin).sum() <= 0.01 * packed.numel()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_int8(number: float) -> None:
    x = torch.ones(2, 40)
    x[1, 3] = number
    packed, scales = quantize_rows(x, None, Workspace(x.device), "x")
    assert packed[0].tolist() == [127] * 40
    assert scales.isfinite().tolist() == [[True], [False]]


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_sums(shape: tuple[int, int], add: bool, scaled: bool, dtype: torch.dtype, threads: int) -> None:
    sums = torch.randint(-(2**24), 2**24, shape, dtype=torch.int32)
    scales, columns = torch.rand(shape[0], 1) / 2**20, torch.rand(shape[1]) if scaled else None
    out = torch.randn(shape).to(dtype)
    twin = sums.double() * scales * (1.0 if columns is None else columns) + (out.double() if add else 0.0)
    c = in_c.native(out)
    assert c
    c.scale_sums(sums, scales, columns, out, add=add)
    torch.testing.assert_close(out.double(), twin, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_are_widened(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    packed, scale = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0], 1)
    layer = Int8Linear.restore(shape, {"packed": packed, "scale": scale}, None)
    compare(lambda: (layer.dequantize(dtype, torch.empty(shape, dtype=dtype)),), dtype)


@DTYPES
def test_threads_do_not_change_results(dtype: torch.dtype) -> None:
    x, grad, weight = hard((640, 67), dtype), hard((640, 67), dtype, 1), torch.rand(67)
    c, found = in_c.native(x), []
    assert c
    before = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        out, grad_x, logits = torch.empty_like(x), torch.empty(x.shape), x.clone()
        c.norm(x, weight, EPSILON, out)
        grad_weight = c.norm_backward(grad, x, weight, EPSILON, grad_x, trained=True)
        losses = c.cross_entropy(logits, torch.arange(640) % 67, 1.0)
        shares, state = x.clone(), [torch.full((640,), fill) for fill in (-torch.inf, 0.0, 0.0, 0.0)]
        c.running_softmax(shares, torch.arange(640) % 67, 0, state)
        c.accumulate_rows(shares, state[0], grad_x)
        assert grad_weight is not None
        found.append((out, grad_x, grad_weight, losses, logits, shares, *state))
    torch.set_num_threads(before)
    for other in found[1:]:
        for one, many in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, many, rtol=0, atol=0, equal_nan=True)


def test_what_the_functions_are_not_for() -> None:
    x = torch.ones(4, 4)
    assert in_c.native(x) is not None
    assert in_c.native(x.t()[1:]) is None
    assert in_c.native(x.double()) is None
    assert in_c.native(x.half()) is None
    assert in_c.native(x, x.bfloat16()) is None
    assert in_c.native(x.to("meta")) is None
