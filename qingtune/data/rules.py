"""How files of data are read: which fields are left out, and how large a row and all rows may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qingtune.config.commands import CheckConfig, EvaluateConfig, InferConfig
from qingtune.config.training import TrainConfig
from qingtune.errors import UserError
from qingtune.machine.resources import free_ram_bytes

SMALL = 64 << 20  # bytes that rows may take before the free memory is looked at


@dataclass(frozen=True)
class Rules:
    """How files of data are read.

    Attributes:
        ignore_fields: fields of rows and turns that are left unread, in lower case.
        max_row_mb: the largest row, in MB of the file's text.
        max_row_turns: the most turns of a row; a template writes the whole conversation for each answer.
        max_data_gb: memory that rows may take while they are kept, in GB; None for half of what is free.
    """

    ignore_fields: frozenset[str] = frozenset()
    max_row_mb: float = 16
    max_row_turns: int = 1000
    max_data_gb: float | None = None

    @property
    def row_bytes(self) -> int:
        """The largest row, in bytes."""
        return int(self.max_row_mb * 1e6)

    def data_bytes(self, taken: int = 0) -> int:
        """Memory that rows may take, of which some is taken already, in bytes."""
        if self.max_data_gb is not None:
            return int(self.max_data_gb * 1e9)
        return max(SMALL, (free_ram_bytes() + taken) // 2)


USUAL = Rules()


def rules_of(settings: CheckConfig | EvaluateConfig | InferConfig | TrainConfig) -> Rules:
    """The rules that a command's settings give."""
    fields = frozenset(name.lower() for name in settings.ignore_fields or ())
    return Rules(fields, settings.max_row_mb, settings.max_row_turns, settings.max_data_gb)


def first_repeated(names: Sequence[str]) -> str | None:
    """The first name that comes again; None where all differ."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def size_in_words(count: int) -> str:
    """Bytes as a message shows them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class MemoryBound:
    """Counts the memory of rows as they are read."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._taken = rules, 0
        self._known = rules.max_data_gb is not None  # else the free memory is looked at once many rows are read
        self._most = rules.data_bytes() if self._known else SMALL

    def take(self, count: int, origin: str) -> None:
        """Count the bytes of a row.

        Raises:
            UserError: the rows take more memory than the rules allow.
        """
        self._taken += count
        if self._taken > self._most and not self._known:
            self._most, self._known = self._rules.data_bytes(self._taken), True
        if self._taken > self._most:
            share = ", half of what was free" if self._rules.max_data_gb is None else ""
            raise UserError(
                f"the rows up to this one take over {size_in_words(self._most)} of memory{share}",
                where=origin,
                fix="Use fewer rows, or raise max_data_gb.",
            )
