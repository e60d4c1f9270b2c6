"""Rotary positions of an answering model, for as many tokens as its cache has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin of every position, each [positions, rotary size / 2]


class Rotary:
    """Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), the halves of what is turned as coordinates.

    Args:
        make: gives a table by its name and how many positions it has; where long sequences have other tables (LongRoPE,
            Ding et al. 2024, https://arxiv.org/abs/2402.13753), one of more positions than `stretched_from` is theirs.
        names: that layers call tables by.
        stretched_from: a sequence longer than this has other positions, from its first token on; None if none.
        query_scaling: (beta, n): queries at position p are multiplied by 1 + beta ln(1 + floor(p / n)).

    Attributes:
        tables: by their names, of up to `stretched_from` positions.
        stretched: the same for longer sequences, as soon as there may be one.
    """

    def __init__(
        self,
        make: Callable[[str, int], Table],
        names: Iterable[str],
        *,
        stretched_from: int | None = None,
        query_scaling: tuple[float, int] | None = None,
    ) -> None:
        self._make, self._names, self._length = make, sorted(names), 0
        self.stretched_from, self.query_scaling = stretched_from, query_scaling
        self.tables: dict[str, Table] = {}
        self.stretched: dict[str, Table] | None = None
        self.reserve(1)

    @property
    def any(self) -> torch.Tensor:
        """One of the tables' parts, for its dtype and device."""
        return self.tables[self._names[0]][0]

    def reserve(self, length: int) -> None:
        """Have tables of this many positions at least."""
        if length <= self._length:
            return
        self._length, most = length, self.stretched_from
        short = length if most is None else min(length, most)
        if len(self.any if self.tables else ()) < short:
            self.tables = {name: self._make(name, short) for name in self._names}
        if most is not None and length > most:
            self.stretched = {name: self._make(name, length) for name in self._names}

    def at(self, places: Sequence[int], stretched: Sequence[bool]) -> dict[str, Table]:
        """Cos and sin of tokens of several sequences at their places, each [T, 1, rotary size / 2], by table.

        stretched: which of the sequences are long ones.
        """
        where = torch.tensor(places, device=self.any.device)
        tables = {name: _rows(table, where) for name, table in self.tables.items()}
        if self.stretched and any(stretched):
            long = torch.tensor(stretched, device=where.device)[:, None, None]
            for name, (cos, sin) in tables.items():
                others = _rows(self.stretched[name], where)
                tables[name] = torch.where(long, others[0], cos), torch.where(long, others[1], sin)
        return tables

    def query_factor(self, places: torch.Tensor) -> torch.Tensor | None:
        """Of queries at places [T]: fp32 [T, 1, 1]; None where all are 1."""
        if self.query_scaling is None:
            return None
        beta, n = self.query_scaling
        return (1 + beta * torch.log1p(places // n)).view(-1, 1, 1)


def _rows(table: Table, places: torch.Tensor) -> Table:
    """A table's rows at places [T], each [T, 1, rotary size / 2]; its last one where it ends before."""
    places = places.clamp(max=len(table[0]) - 1)
    return table[0][places, None], table[1][places, None]
