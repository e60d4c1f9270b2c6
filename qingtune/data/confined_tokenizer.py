"""A tokenizer in a process with limits of time and memory, for one that cuts text by an unknown regular expression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qingtune.data.worker import Worker
from qingtune.errors import UserError

WORKER = Path(__file__).with_name("tokenizer_worker.py")
SECONDS = 10.0  # that a text may take; a usual one takes a thousandth


class ConfinedTokenizer:
    """The tokenizer.

    Args:
        content: what its tokenizer.json holds.
    """

    def __init__(self, content: str) -> None:
        self._content = content
        self._worker: Worker | None = None

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[list[int], list[bool]]]:
        """Ids of each text, and which of them the tokenizer puts around it by itself.

        Raises:
            UserError: it fails on one of them, or takes too long.
        """
        if self._worker is None:
            self._worker = Worker(WORKER, SECONDS, needs="tokenizers")
            self._ask({"tokenizer": self._content})
        answer = self._ask({"texts": texts, "add_special_tokens": add_special_tokens})
        return [(ids, [bool(flag) for flag in added]) for ids, added in answer["encoded"]]

    def _ask(self, request: dict[str, object]) -> Any:
        assert self._worker is not None
        answer = None
        try:
            answer = self._worker.ask(request)
        finally:
            if answer is None:  # also after Ctrl-C, as the answer is still to come
                self._worker = None
        if answer is None:
            raise UserError(f"the model's tokenizer was stopped: a text took over {SECONDS:g} s, or too much memory")
        if "error" in answer:
            raise UserError(f"the model's tokenizer fails: {answer['error']}")
        return answer
