"""Calls of a tokenizer, which comes with a model: what goes wrong within is a message, not a traceback."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from qingtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of a text; with `add_special_tokens` between what the tokenizer puts around a text by itself."""
    with panics_as_errors():
        return cast("list[int]", tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of ids."""
    with panics_as_errors():
        return cast("Any", tokenizer).decode(list(ids), skip_special_tokens=skip_special_tokens)
