"""A group of layers equals the sum of plain ones with their adapters: values, and gradients of all that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_twin import CPU, Call, check, close, make_base, make_member

from qingtune.kernels.int8 import multiplies_int8
from qingtune.kernels.native import low_rank
from qingtune.kernels.projection import Member
from qingtune.kernels.workspace import Workspace

UNITS = multiplies_int8(CPU)  # elsewhere PyTorch's int8 products are wrong, and nothing of ours asks for them
needs_int8_units = pytest.mark.skipif(not UNITS, reason="needs int8 units")
WITH_UNITS = pytest.param("int8", True, marks=needs_int8_units)

# --- Dense weights ---------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> Call:
    torch.manual_seed(draw(st.integers(0, 99)))
    trained = draw(st.booleans())
    members = []
    for _ in range(draw(st.integers(1, 3))):
        base = make_base("dense", draw(st.integers(1, 20)), draw(st.booleans()), torch.float64, trained)
        members.append(make_member(base, draw(st.integers(0, 5)), torch.float64))
    return Call(
        members, rows=draw(st.integers(1, 30)), dropout=draw(st.sampled_from([0.0, 0.3])), add=draw(st.booleans())
    )


@settings(max_examples=25, deadline=None)
@given(call=calls(), wanted=st.booleans())
def test_any_group_of_dense_layers(call: Call, wanted: bool) -> None:
    check(call, wanted=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fp32_adapters_on_frozen_weights_of_the_activations_format(dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    members = [
        make_member(make_base("dense", out, bias=out > 8, dtype=dtype), rank) for out, rank in ((16, 4), (8, 2), (9, 0))
    ]
    check(Call(members, dtype, rows=50, dropout=dropout))


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_even_ranks(
    dtype: torch.dtype, dora: bool, dropout: float, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_c and low_rank.native_low_rank(dtype, CPU) is None:
        pytest.skip("PyTorch multiplies adapters of these here")
    if dora and dropout:
        pytest.skip("refused")
    if not in_c:
        monkeypatch.setattr(low_rank, "low_rank", lambda: None)
    torch.manual_seed(0)
    members = [
        make_member(make_base("dense", out, bias=out > 8, dtype=dtype), rank, dora=dora and out > 8)
        for out, rank in ((16, 4), (40, 34), (8, 2), (6, 0))
    ]
    call = Call(members, dtype, rows=51, dropout=dropout)
    call.grads[0] = call.grads[0].t().contiguous().t()  # as those of a delta net's gates lie
    check(call)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_fp32_weights_are_trained_with_bf16_activations(bias: bool, add: bool) -> None:
    torch.manual_seed(0)
    call = Call(
        [make_member(make_base("dense", out, bias, trained=True), 0) for out in (16, 8)], torch.bfloat16, 40, add=add
    )
    check(call)
    assert {p.grad.dtype for p in call.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_add_up_over_calls(rank: int) -> None:
    torch.manual_seed(0)
    base = make_base("dense", 7, True, torch.float64, trained=True)
    members, workspace = [make_member(base, rank, torch.float64)], Workspace(CPU)
    one, two = Call(members, rows=5), Call(members, rows=11, dropout=0.4)
    with torch.no_grad():
        for call in (one, two):
            call.forward(workspace)
            call.backward(workspace)
    sums = [a + b for a, b in zip(one.plain()[1][1:], two.plain()[1][1:], strict=True)]
    assert len(sums) == (4 if rank else 2)
    for parameter, twin in zip(one.parameters(), sums, strict=True):
        close(parameter.grad, twin, torch.float64)


def test_a_frozen_bias_beside_a_trained_weight_gets_no_gradient() -> None:
    base = make_base("dense", 5, True, trained=True)
    base.bias.requires_grad_(False)
    call = Call([Member(base, None)], torch.float32)
    check(call)
    assert base.bias.grad is None
    assert base.weight.grad is not None


# --- Quantised weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "int8_units"), [("nf4", False), ("nf4", True), ("int8", False), WITH_UNITS])
def test_quantised_layers(kind: str, int8_units: bool, dropout: float, add: bool) -> None:
    torch.manual_seed(0)
    members = [
        make_member(make_base(kind, out, bias), rank)
        for out, bias, rank in ((16, True, 3), (8, False, 0), (24, True, 5))
    ]
    # products of rounded rows may differ by a step where fp32 rounds a half the other way
    call = Call(members, torch.float32, rows=150, dropout=dropout, add=add, int8_units=int8_units)
    check(call, factor=10)
    assert all(p.grad is None for member in members for p in member.base.parameters())


@needs_int8_units
@pytest.mark.parametrize("order", [("int8", "dense", "nf4"), ("dense", "int8", "int8"), ("nf4", "int8", "dense")])
def test_a_group_of_several_kinds(order: Sequence[str]) -> None:
    torch.manual_seed(0)
    members = [make_member(make_base(kind, 8 + i, i == 1), i) for i, kind in enumerate(order)]
    check(Call(members, torch.float32, rows=20, int8_units=True), factor=10)


@pytest.mark.parametrize(("kind", "int8_units"), [("nf4", False), ("int8", False), WITH_UNITS])
def test_quantised_layers_with_bf16_activations(kind: str, int8_units: bool) -> None:
    torch.manual_seed(0)
    members = [make_member(make_base(kind, out, True), 4) for out in (16, 8)]
    check(Call(members, torch.bfloat16, rows=40, dropout=0.2, int8_units=int8_units))


@needs_int8_units
def test_int8_units_stay_close_to_dequantised_weights() -> None:
    torch.manual_seed(0)
    call = Call([make_member(make_base("int8", 32, True), 0)], torch.float32, rows=200)
    ((dequantised,), grads), call.int8_units = call.plain(), True
    ((multiplied,), others) = call.plain()
    for one, two in ((dequantised, multiplied), (grads[0], others[0])):
        assert 0 < (one - two).norm() <= 0.02 * one.norm()
    check(call, factor=10)


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_dora_beside_plain_adapters(add: bool, wanted: bool) -> None:
    torch.manual_seed(0)
    members = [
        make_member(make_base("dense", out, bias, torch.float64), rank, torch.float64, dora)
        for out, bias, rank, dora in (
            (16, True, 3, True),
            (8, False, 2, False),
            (9, False, 4, True),
            (5, True, 0, False),
        )
    ]
    check(Call(members, rows=30, add=add), wanted=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "int8_units"), [("dense", False), ("nf4", False), ("int8", False), WITH_UNITS])
def test_dora_on_weights_of_any_kind(kind: str, int8_units: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    members = [make_member(make_base(kind, out, bias, dtype), 4, dora=True) for out, bias in ((16, True), (8, False))]
    call = Call(members, dtype, rows=50, int8_units=int8_units)
    check(call, factor=1 if kind == "dense" else 10)
    assert {p.grad.dtype for p in call.parameters() if p.grad is not None} == {torch.float32}


def test_dora_with_dropout_is_refused() -> None:
    call = Call([make_member(make_base("dense", 8, True), 4, dora=True)], torch.float32, dropout=0.1)
    with pytest.raises(ValueError, match="dropout"):
        call.projection(Workspace(CPU))


# --- Buffers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", pytest.param("int8", marks=needs_int8_units)])
def test_layers_interleave_under_their_own_names_while_sizes_grow_and_shrink(kind: str) -> None:
    torch.manual_seed(0)
    workspace = Workspace(CPU)
    members: Callable[[], list[Member]] = lambda: [make_member(make_base(kind, 8, True), 4)]  # noqa: E731
    for rows in (5, 200, 1, 7):
        one, two = (Call(members(), torch.float32, size, 0.2, int8_units=True) for size in (rows, rows + 3))
        with torch.no_grad():
            found = [one.forward(workspace, "a"), two.forward(workspace, "b")]
            grads = [two.backward(workspace, "b"), one.backward(workspace, "a")][::-1]
        for call, outs, grad_x in zip((one, two), found, grads, strict=True):
            twin_outs, (twin_grad_x, *twin_grads) = call.plain()
            mine = [*outs, grad_x, *(p.grad for p in call.parameters())]
            for x, twin in zip(mine, [*twin_outs, twin_grad_x, *twin_grads], strict=True):
                close(x, twin, torch.float32, 10)


@pytest.mark.parametrize(("dora", "dropout"), [(False, 0.3), (True, 0.0)])
def test_the_low_product_can_be_made_again_instead_of_forward(dora: bool, dropout: float) -> None:
    torch.manual_seed(0)
    workspace = Workspace(CPU)
    call = Call([make_member(make_base("dense", 8, False, torch.float64), 4, torch.float64, dora)], dropout=dropout)
    with torch.no_grad():
        call.forward(workspace, "a")
        other = make_member(make_base("dense", 8, False, torch.float64), 4, torch.float64, dora)
        Call([other], rows=30).forward(workspace, "a")  # another layer of which nothing is kept
        call.projection(workspace).keep_low("a", call.x, call.seed)
        grad_x = call.backward(workspace, "a")
    for mine, twin in zip([grad_x, *(p.grad for p in call.parameters())], call.plain()[1], strict=True):
        close(mine, twin, torch.float64)


@pytest.mark.parametrize("kind", ["dense", "nf4", pytest.param("int8", marks=needs_int8_units)])
def test_what_a_pass_of_nan_left_behind_is_not_read(kind: str) -> None:
    torch.manual_seed(0)
    workspace = Workspace(CPU)
    call = Call([make_member(make_base(kind, 8, True), 4)], torch.float32, dropout=0.2, int8_units=True)
    broken = Call([make_member(make_base(kind, 8, True), 4)], torch.float32, dropout=0.2, int8_units=True)
    for x in (broken.x, *broken.grads):
        x.fill_(torch.nan)
    with torch.no_grad():
        assert broken.forward(workspace)[0].isnan().all()
        grad_x = broken.backward(workspace)
    assert grad_x is not None
    assert grad_x.isnan().all()
    check(call, workspace, factor=10)


@pytest.mark.parametrize("kind", ["dense", pytest.param("int8", marks=needs_int8_units)])
def test_no_rows_are_no_trouble(kind: str) -> None:
    call = Call([make_member(make_base(kind, 8, True), 4)], torch.float32, rows=0, int8_units=True)
    with torch.no_grad():
        assert call.forward(Workspace(CPU))[0].shape == (0, 8)
