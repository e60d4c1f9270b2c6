"""Tensors that several processes wrote are read whole, by rows, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qingtune.errors import UserError
from qingtune.training.part_files import PartFiles, Rows, check_parts, part_name

MATRIX = torch.arange(35.0).view(7, 5)
VECTOR = torch.arange(4.0)
BLOCKS = torch.arange(12.0).view(6, 2)  # of an optimizer's states: two for each process


@pytest.fixture(params=[1, 3])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A matrix and a vector by one process, or by three that have 3, 3 and 1 of the matrix's rows."""
    if request.param == 1:
        save_file({"m": MATRIX, "v": VECTOR, "m::blocks": BLOCKS}, tmp_path / "weights.safetensors")
        return tmp_path
    for index, (rows, blocks) in enumerate(zip(MATRIX.split(3), BLOCKS.split(2), strict=True)):
        tensors = {"m": rows.clone(), "m::blocks": blocks.clone()} | ({"v": VECTOR} if index == 0 else {})
        save_file(tensors, tmp_path / part_name("weights", index, 3))
    return tmp_path


def test_rows_are_those_of_the_whole(folder: Path) -> None:
    files = PartFiles(folder, "weights")
    assert files.shapes == {"m": (7, 5), "v": (4,), "m::blocks": (6, 2)}
    assert torch.equal(files.read("m", None), MATRIX)
    assert torch.equal(files.read("v", None), VECTOR)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(files.read("m", Rows(start, stop, 7)), MATRIX[start:stop])
            assert torch.equal(files.read_state("m", (7, 5), Rows(start, stop, 7)), MATRIX[start:stop])


@pytest.mark.parametrize("folder", [3], indirect=True)
def test_blocks_go_to_the_process_that_has_the_same_rows(folder: Path) -> None:
    files = PartFiles(folder, "weights")
    for index, (start, stop) in enumerate([(0, 3), (3, 6), (6, 7)]):
        assert torch.equal(files.read_state("m::blocks", (7, 5), Rows(start, stop, 7)), BLOCKS.split(2)[index])
    for rows in (None, Rows(0, 4, 7), Rows(4, 7, 7)):
        with pytest.raises(
            UserError, match="8-bit states are in blocks of the rows that each process had, and 3 of them"
        ):
            files.read_state("m::blocks", (7, 5), rows)


@pytest.mark.parametrize("folder", [1], indirect=True)
def test_blocks_of_one_process_are_for_one(folder: Path) -> None:
    files = PartFiles(folder, "weights")
    assert torch.equal(files.read_state("m::blocks", (7, 5), None), BLOCKS)
    with pytest.raises(UserError, match="and 1 of them saved these"):
        files.read_state("m::blocks", (7, 5), Rows(0, 4, 7))


def test_a_part_on_another_disk_is_named(tmp_path: Path) -> None:
    save_file({"m": MATRIX}, tmp_path / part_name("weights", 0, 2))
    with pytest.raises(UserError, match=r"weights-2-of-2\.safetensors, which another process wrote, is not here"):
        check_parts(tmp_path, ["weights"], 2)
