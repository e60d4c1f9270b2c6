"""A workspace gives the same memory for the same name and format, and more when more is asked for."""

from __future__ import annotations

import pytest
import torch

from qingtune.kernels.native import elementwise as in_c
from qingtune.kernels.workspace import Workspace

CPU = torch.device("cpu")


def test_what_is_taken_has_the_shape_and_format_asked_for() -> None:
    workspace = Workspace(CPU)
    for shape in [(3, 4), (2,), (5, 1, 6), (0, 7), (40, 2)]:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            taken = workspace.take("a", shape, dtype)
            assert (taken.shape, taken.dtype, taken.is_contiguous()) == (shape, dtype, True)


def test_the_same_name_gives_the_same_memory_in_any_shape_that_fits() -> None:
    workspace = Workspace(CPU)
    first = workspace.take("a", (4, 6), torch.float32)
    first.copy_(torch.arange(24).view(4, 6))
    again = workspace.take("a", (2, 3), torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert workspace.take("a", (24,), torch.float32).equal(first.flatten())  # the shorter one in between cost nothing


def test_other_names_and_formats_have_memory_of_their_own() -> None:
    workspace = Workspace(CPU)
    taken = [
        workspace.take(name, (8,), dtype).fill_(value)
        for value, (name, dtype) in enumerate(
            [("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16), ("a", torch.int32)]
        )
    ]
    assert [set(x.tolist()) for x in taken] == [{0}, {1}, {2}, {3}]


def test_a_buffer_grows_and_its_old_memory_is_given_back() -> None:
    workspace = Workspace(CPU)
    workspace.take("a", (10,), torch.float32)
    assert workspace.take("a", (11,), torch.float32).numel() == 11
    workspace.take("a", (3,), torch.float32)
    workspace.take("b", (5,), torch.bfloat16)
    assert workspace.held_bytes() == 11 * 4 + 5 * 2


def test_after_a_buffer_has_grown_no_shape_gives_its_old_memory() -> None:
    workspace = Workspace(CPU)
    for size in (4, 9, 4, 12, 9, 4):
        taken = workspace.take("a", (size,), torch.float32)
        assert taken.untyped_storage().data_ptr() == workspace._held["a", torch.float32].data_ptr()
        assert workspace.take("a", (size,), torch.float32).shape == (size,)
    workspace.clear()
    assert workspace.held_bytes() == 0
    first, second = (workspace.take("a", (4,), torch.float32) for _ in range(2))
    assert first.data_ptr() == second.data_ptr() == workspace._held["a", torch.float32].data_ptr()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("total_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_to_totals_of_any_dtype(
    dtype: torch.dtype, total_dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(in_c, "elementwise", lambda: None)
    draw = torch.Generator().manual_seed(0)
    left, right, start = (
        torch.randn(shape, generator=draw).to(kind)
        for shape, kind in (((40, 70), dtype), ((40, 33), dtype), ((70, 33), total_dtype))
    )
    total = start.clone()
    Workspace(CPU).add_product(total, left.t(), right, 0.5)
    wanted = start.double() + 0.5 * left.double().t() @ right.double()
    bound = 1e-5 if torch.bfloat16 not in (dtype, total_dtype) else 2**-6
    torch.testing.assert_close(total.double(), wanted, rtol=bound, atol=4 * bound)


def test_headroom_spares_a_later_pass_a_new_buffer() -> None:
    workspace = Workspace(CPU)
    workspace.headroom = 1.5
    first = workspace.take("a", (3, 3), torch.float32)
    assert workspace.held_bytes() == 14 * 4
    assert workspace.take("a", (14,), torch.float32).data_ptr() == first.data_ptr()
    workspace.headroom = 1.0
    workspace.take("a", (15,), torch.float32)
    assert workspace.held_bytes() == 15 * 4
