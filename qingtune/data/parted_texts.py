"""Ids of the texts that a template writes of conversations: each part between two control tokens is encoded once.

A tokenizer takes a text apart at its control tokens before anything else, so a part has the same ids in every text. Of
a conversation's texts, each mostly begins as the one before it: what they share is neither cut nor joined again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

from qingtune.data.encoder import Encoder
from qingtune.data.templates import Rendered
from qingtune.errors import UserError


class PartedTexts:
    """The texts of a conversation, cut into parts.

    Args:
        encoder: cuts them.
        rendered: the texts.
        veiled: whether one of them holds a mark of the encoder's, so that they are encoded as a whole.
    """

    def __init__(self, encoder: Encoder, rendered: Rendered, *, veiled: bool) -> None:
        self._encoder, self._rendered, self._veiled = encoder, rendered, veiled
        self._changes = [] if veiled else list(self._cut())

    def _cut(self) -> Iterator[tuple[int, list[str]]]:
        """Of each text how many parts of the text before it begins with, and the parts after these."""
        text, starts = "", [0]
        for shared, rest in self._rendered.changes:
            text = text[:shared] + rest
            kept = max(0, bisect_right(starts, shared - self._encoder.longest_cut) - 1)  # the last of these may go on
            starts[kept:] = self._encoder.cuts(text, starts[kept])
            yield kept, [text[start:end] for start, end in pairwise([*starts[kept:], len(text)])]

    def parts(self) -> Iterator[str]:
        """All parts that `ids` asks for."""
        return (part for _, parts in self._changes for part in parts)

    def ids(self, encoded: PartIds) -> Iterator[tuple[str, array[int]]]:
        """Yield each text with its ids, which are those of `Encoder.ids`.

        Raises:
            TemplateError: a text could not be rendered, in its place.
            UserError: a text cannot be encoded.
        """
        if self._veiled:
            yield from ((text, array("i", self._encoder.ids(text))) for text in self._rendered)
            return
        ids, ends = array("i"), [0]
        for text, (kept, parts) in zip(self._rendered, self._changes, strict=True):
            del ends[kept + 1 :]
            ids = ids[: ends[kept]]
            for part in parts:
                ids.extend(encoded[part])
                ends.append(len(ids))
            yield text, ids


class PartIds(dict[str, "array[int]"]):
    """Ids of parts, encoded many at a time; where one of them fails, each by itself when it is asked for."""

    def __init__(self, encoder: Encoder, parts: Iterable[str]) -> None:
        super().__init__()
        self._encoder = encoder
        several = list(dict.fromkeys(parts))
        try:
            self.update((part, array("i", ids)) for part, ids in zip(several, encoder.encoded(several), strict=True))
        except UserError:
            self.clear()

    def __missing__(self, part: str) -> array[int]:
        """Encode a part by itself, whose error is then that of the row it belongs to."""
        return array("i", self._encoder.encoded([part])[0])
