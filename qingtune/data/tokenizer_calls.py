"""Calls of a tokenizer, which comes with a model: what goes wrong within is a message, not a traceback.

One that cuts text by an unknown regular expression works in a process with limits of time and memory.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from qingtune.data.tokenizer_limits import has_foreign_patterns, steps_of
from qingtune.data.worker import Worker
from qingtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # that a text may take in a process with limits; a usual one takes a thousandth


@contextmanager
def panics_as_errors() -> Generator[None]:
    """Raise a UserError for a panic of the tokenizers library, which is no Exception and would pass every handler."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the model's tokenizer fails: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}",
            fix="Use a model with a working tokenizer.",
        ) from None


class ConfinedTokenizer:
    """A tokenizer in a process with limits, made of what its tokenizer.json holds."""

    def __init__(self, content: str) -> None:
        self._worker = Worker("tokenizer", SECONDS, opening={"tokenizer": content})

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[list[int], list[int]]]:
        """Ids of each text, and of each id whether (1) or not (0) the tokenizer puts it around a text by itself.

        Raises:
            UserError: it fails on one of them, or takes too long.
        """
        answer = self._worker.ask({"texts": texts, "add_special_tokens": add_special_tokens})
        if answer is None:
            raise UserError(f"the model's tokenizer was stopped: a text took over {SECONDS:g} s, or too much memory")
        if "error" in answer:
            raise UserError(f"the model's tokenizer fails: {answer['error']}")
        return answer["encoded"]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of a text; with `add_special_tokens` between what the tokenizer puts around a text by itself.

    Raises:
        UserError: the tokenizer fails on it, or takes too long.
    """
    return encode_many(tokenizer, [text], add_special_tokens=add_special_tokens)[0]


def encode_many(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text, as `encode` gives them; fast tokenizers work on several texts at a time.

    Raises:
        UserError: the tokenizer fails on one of them, or takes too long.
    """
    if not texts:
        return []
    with panics_as_errors():
        if confined := _confined(tokenizer):
            return [ids for ids, _ in confined.encode(texts, add_special_tokens=add_special_tokens)]
        encoded = tokenizer(
            list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False
        )
        return cast("list[list[int]]", encoded["input_ids"])


_CONFINED: WeakKeyDictionary[Any, ConfinedTokenizer | None] = WeakKeyDictionary()


def _confined(tokenizer: PreTrainedTokenizerBase) -> ConfinedTokenizer | None:
    """The tokenizer in a separate process, if it cuts text by an unknown regular expression."""
    if tokenizer not in _CONFINED:
        foreign = has_foreign_patterns(steps_of(tokenizer))
        content = cast("Any", tokenizer).backend_tokenizer.to_str() if foreign else None
        _CONFINED[tokenizer] = None if content is None else ConfinedTokenizer(content)
    return _CONFINED[tokenizer]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of ids.

    Raises:
        UserError: the tokenizer fails on them.
    """
    with panics_as_errors():
        return cast("Any", tokenizer).decode(list(ids), skip_special_tokens=skip_special_tokens)
