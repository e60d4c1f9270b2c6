"""RMSNorm, SwiGLU and rotary positions equal their formulas, and their backward passes what autograd finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qingtune.kernels.architecture import Activation
from qingtune.kernels.elementwise import Norm, rotate, swiglu, swiglu_backward
from qingtune.kernels.workspace import Workspace

EPSILON = 1e-6
# of the largest value of a tensor
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.01}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


def close(mine: torch.Tensor, twin: torch.Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == twin.shape
    torch.testing.assert_close(mine.double(), twin, rtol=0, atol=BOUNDS[dtype] * max(1.0, float(twin.abs().max())))


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float64, copy=True).requires_grad_()


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


def check_norm(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, offset: float = 0.0) -> None:
    torch.manual_seed(sum(shape))
    x, grad = (
        torch.randn(shape, dtype=torch.float64).mul(3).to(dtype),
        torch.randn(shape, dtype=torch.float64).to(dtype),
    )
    weight = torch.randn(shape[-1], dtype=torch.float64).to(weight_dtype).requires_grad_()
    wide_x, wide_weight = leaf(x), leaf(weight)
    y = plain_norm(wide_x, offset + wide_weight)
    grad_x, grad_weight = torch.autograd.grad(y, (wide_x, wide_weight), grad.double())
    kept = x.clone(), grad.clone()
    with torch.no_grad():
        norm = Norm(weight, EPSILON, Workspace(x.device), offset)
        out = norm.forward(x, "out")
        for _ in range(2):  # gradients add up
            found = norm.backward(grad, x)
    assert x.equal(kept[0])
    assert grad.equal(kept[1])
    assert out.dtype == dtype
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    close(out, y.detach(), dtype)
    close(found, grad_x, dtype)
    assert weight.grad is not None
    close(weight.grad, 2 * grad_weight, weight_dtype if weight_dtype == torch.bfloat16 else dtype)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, offset=st.sampled_from([0.0, 1.0]))
def test_a_norm_of_any_shape_and_its_gradients(shape: tuple[int, ...], offset: float) -> None:
    check_norm(shape, torch.float64, torch.float64, offset)


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_whose_weight_has_another_format(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for offset in (0.0, 1.0):
        check_norm((40, 3, 64), dtype, weight_dtype if dtype != torch.float64 else torch.float64, offset)


def test_the_backward_of_bf16_is_taken_in_fp32() -> None:
    x, grad, weight = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = leaf(x)
    (twin,) = torch.autograd.grad(plain_norm(wide, weight.double()), wide, grad.double())
    close(Norm(weight, EPSILON, Workspace(x.device)).backward(grad, x), twin, torch.float32)


def test_a_frozen_norm_gets_no_gradient() -> None:
    norm = Norm(torch.ones(4), EPSILON, Workspace(torch.device("cpu")))
    norm.backward(torch.randn(2, 4), torch.randn(2, 4))
    assert norm.weight.grad is None


def test_a_row_of_zeros_has_finite_gradients() -> None:
    grad_x = Norm(torch.ones(4), EPSILON, Workspace(torch.device("cpu"))).backward(torch.ones(1, 4), torch.zeros(1, 4))
    torch.testing.assert_close(grad_x, torch.full((1, 4), EPSILON**-0.5))


# --- SwiGLU and GeGLU ------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_units_and_their_gradients_in_place(activation: Activation, dtype: torch.dtype) -> None:
    function = ACTIVATIONS[activation]
    torch.manual_seed(0)
    for shape in [(3, 5), (40, 33), (2, 7)]:
        gate, up, grad = (torch.randn(shape, dtype=torch.float64).mul(4).to(dtype) for _ in range(3))
        wide_gate, wide_up = leaf(gate), leaf(up)
        product = function(wide_gate) * wide_up
        twins = torch.autograd.grad(product, (wide_gate, wide_up), grad.double())
        kept = gate.clone(), up.clone()
        out, activated = torch.full_like(gate, torch.nan), torch.full_like(gate, torch.nan)
        assert swiglu(gate, up, out, out, activation) is out
        close(out, product.detach(), dtype)
        assert swiglu(gate, up, activated, out, activation) is out
        close(out, product.detach(), dtype)
        assert gate.equal(kept[0])
        grad_up = swiglu_backward(grad, gate, up, activated, activation)
        assert grad_up is up or up.equal(kept[1])
        for mine, twin in zip((gate, grad_up), twins, strict=True):
            close(mine, twin, dtype)


def test_swiglu_far_from_zero_is_finite() -> None:
    gate, up, grad, activated = torch.tensor([[-1e4, 1e4]]), torch.ones(1, 2), torch.ones(1, 2), torch.empty(1, 2)
    assert swiglu(gate, up, activated, torch.empty(1, 2)).tolist() == [[0, 1e4]]
    grad_up = swiglu_backward(grad, gate, up, activated)
    assert (gate.tolist(), grad_up.tolist()) == ([[0, 1]], [[0, 1e4]])


# --- Rotary positions ------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [8, 11])
def test_rotation_turns_pairs_of_coordinates_and_minus_sin_is_its_backward(
    dtype: torch.dtype, heads: int, size: int
) -> None:
    torch.manual_seed(0)
    angles = torch.rand(11, 1, 4, dtype=torch.float64) * 50
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x, grad = (torch.randn(11, heads, size, dtype=torch.float64).to(dtype) for _ in range(2))
    wide = leaf(x)
    turned = torch.view_as_complex(torch.stack(wide[..., :8].split(4, -1), -1)) * torch.complex(
        cos.double(), sin.double()
    )
    y = torch.cat([turned.real, turned.imag, wide[..., 8:]], -1)
    (twin,) = torch.autograd.grad(y, wide, grad.double())
    out = torch.full_like(x, torch.nan)
    assert rotate(x, cos, sin, out) is out
    close(out, y.detach(), dtype)
    close(rotate(grad, cos, -sin, torch.empty_like(grad)), twin, dtype)


@settings(max_examples=20, deadline=None)
@given(places=st.tuples(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000)))
def test_products_of_rotated_heads_tell_distances_alone(places: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    rates = 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def at(x: torch.Tensor, place: int) -> torch.Tensor:
        return rotate(x, (rates * place).cos()[None, None], (rates * place).sin()[None, None], torch.empty_like(x))

    first, second, shift = places
    near, far = ((at(q, first + s) * at(k, second + s)).sum() for s in (0, shift))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)
