"""A tokenizer in a process with limits of time and memory, for one that cuts text by an unknown regular expression."""

from __future__ import annotations

from pathlib import Path

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

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[bool]]:
        """Ids of a text, and which of them the tokenizer puts around it by itself.

        Raises:
            UserError: it fails on the text, or takes too long or too much memory.
        """
        if self._worker is None:
            self._worker = Worker(WORKER, SECONDS, needs="tokenizers")
            self._ask({"tokenizer": self._content})
        answer = self._ask({"text": text, "add_special_tokens": add_special_tokens})
        return answer["ids"], [bool(added) for added in answer["added"]]

    def _ask(self, request: dict[str, object]) -> dict[str, list[int]]:
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
