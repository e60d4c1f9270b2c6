"""Tensors of a checkpoint in one file, or in one for each process of a sharded run.

`weights.safetensors`, or `weights-1-of-3.safetensors` and so on: a tensor that is in all of these has its rows in them,
in order; one that only the first has is whole there. So a run reads its rows however many processes wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qingtune.errors import UserError
from qingtune.files.foreign import foreign_files
from qingtune.files.weights_file import read_header


@dataclass(frozen=True)
class Rows:
    """Which rows of a parameter a process keeps: those from start to stop, of so many in all."""

    start: int
    stop: int
    count: int


def part_name(stem: str, index: int, count: int) -> str:
    """The file of a process, counted from 0."""
    return f"{stem}-{index + 1}-of-{count}.safetensors"


def check_parts(folder: Path, stems: Sequence[str], count: int) -> None:
    """Make sure that every process wrote its files here.

    Raises:
        UserError: one did not.
    """
    for name in (part_name(stem, index, count) for stem in stems for index in range(count)):
        if not (folder / name).exists():
            raise UserError(
                f"{name}, which another process wrote, is not here",
                where=str(folder.parent),
                fix="Put output_dir on a disk that all processes share.",
            )


class PartFiles:
    """The tensors of a checkpoint, read a piece at a time.

    Args:
        folder: of the checkpoint, known to be whole.
        stem: of the files' names.

    Attributes:
        shapes: of the whole tensors, by name.

    Raises:
        UserError: a file is no safetensors file.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        single = folder / f"{stem}.safetensors"
        count = len(list(folder.glob(f"{stem}-*-of-*.safetensors")))
        self._files = [folder / part_name(stem, index, count) for index in range(count)] or [single]
        self._pieces: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        for path in self._files:
            for name, place in read_header(path)[0].items():
                self._pieces.setdefault(name, []).append((path, tuple(place.shape)))
        self.shapes = {name: self._shape([shape for _, shape in pieces]) for name, pieces in self._pieces.items()}

    def read(self, name: str, rows: Rows | None) -> torch.Tensor:
        """A tensor, or some rows of it."""
        pieces: list[torch.Tensor] = []
        start = 0
        for path, shape in self._pieces[name]:
            with _open(path) as file:
                if rows is None:
                    pieces.append(file.get_tensor(name))
                    continue
                first, last = max(rows.start - start, 0), min(rows.stop - start, shape[0])
                if first < last:
                    pieces.append(file.get_slice(name)[first:last])
                start += shape[0]
        if len(pieces) == 1:
            return pieces[0]
        if pieces:
            return torch.cat(pieces)
        with _open(self._files[0]) as file:  # none of its rows
            return file.get_tensor(name)[:0]

    def read_state(self, name: str, shape: tuple[int, ...], rows: Rows | None) -> torch.Tensor:
        """An optimizer's state of a parameter, as the process that keeps these rows needs it; shape: the parameter's.

        Raises:
            UserError: the state is made of blocks of the rows that another process kept.
        """
        pieces = self._pieces[name]
        if self.shapes[name] == shape:
            return self.read(name, rows)
        if len(pieces) == 1 and (rows is None or not self.shapes[name]):  # as it was kept whole, or a single number
            return self.read(name, None)
        each = -(-shape[0] // len(pieces))
        bounds = {(start, min(start + each, shape[0])) for start in range(0, shape[0], each)}
        if rows is None or (rows.start < rows.stop and (rows.start, rows.stop) not in bounds):
            raise UserError(
                "the optimizer's 8-bit states are in blocks of the rows that each process had, and "
                f"{len(pieces)} of them saved these",
                where=str(pieces[0][0].parent),
                fix="Resume with as many processes and the same setting of shard.",
            )
        path, _ = pieces[rows.start // each if rows.start < rows.stop else -1]
        with _open(path) as file:
            return file.get_tensor(name)

    def _shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len(shapes) == 1:
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _open(path: Path) -> AbstractContextManager[Any]:
    with foreign_files("the checkpoint cannot be loaded", path):
        return safe_open(path, "pt")
