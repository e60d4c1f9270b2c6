"""Ids of the texts that a template writes of conversations: each part between two control tokens is encoded once.

Of a conversation's texts, each mostly begins as the one before it: what they share is neither cut nor joined again.
"""

from __future__ import annotations

import contextlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

from qingtune.data.encoder import Encoder
from qingtune.data.sealed_tokenizer import SECRET
from qingtune.data.templates import Rendered, TemplateError
from qingtune.errors import UserError


class PartedTexts:
    """The texts of a conversation, each cut into parts.

    Args:
        encoder: cuts them.
        rendered: the texts.
    """

    def __init__(self, encoder: Encoder, rendered: Rendered) -> None:
        self._error = rendered.error
        # Of each text what it adds to the text before it, None where it changes that; how many parts it has in common
        # with it; and the parts after these.
        self._changes: list[tuple[str | None, int, list[str]]] = []
        text, starts = "", [0]
        for shared, rest in rendered.changes:
            added = rest if shared == len(text) else None
            text = text[:shared] + rest
            kept = max(0, bisect_right(starts, shared - encoder.longest_cut) - 1)  # the last of these may go on
            starts[kept:] = encoder.cuts(text, starts[kept])
            parts = [text[start:end] for start, end in pairwise([*starts[kept:], len(text)])]
            self._changes.append((added, kept, parts))

    def parts(self) -> Iterator[str]:
        """All parts that `ids` asks for."""
        return (part for _, _, parts in self._changes for part in parts)

    def ids(self, encoded: PartIds) -> Iterator[tuple[str | None, array[int]]]:
        """Yield of each text what it adds to the one before it, None where it changes that, and its `Encoder.ids`.

        Raises:
            TemplateError: a text could not be rendered, in its place.
            UserError: a text cannot be encoded.
        """
        ids, ends = array("i"), [0]
        for added, kept, parts in self._changes:
            del ends[kept + 1 :]
            ids = ids[: ends[kept]]
            for part in parts:
                ids.extend(encoded[part])
                ends.append(len(ids))
            yield added, ids
        if self._error is not None:
            raise TemplateError(self._error)


class PartIds(dict[str, "array[int]"]):
    """Ids of parts: those without marks are encoded together and, where one of them fails, when they are asked for."""

    def __init__(self, encoder: Encoder, parts: Iterable[str]) -> None:
        super().__init__()
        self._encoder = encoder
        several = [part for part in dict.fromkeys(parts) if SECRET not in part]
        with contextlib.suppress(UserError):
            self.update((part, array("i", ids)) for part, ids in zip(several, encoder.encoded(several), strict=True))

    def __missing__(self, part: str) -> array[int]:
        """Encode a part by itself, whose error is then that of the row it belongs to."""
        self[part] = ids = array("i", self._encoder.encoded([part])[0])
        return ids
