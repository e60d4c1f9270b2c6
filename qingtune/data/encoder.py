"""Text -> token ids, so that control tokens come from the chat template alone, never from what a user or a row says.

Contents that hold the text of a control token are veiled before they are rendered: its first character is replaced by a
mark that no one can guess. What the template then writes is cut into parts at its own control tokens, where a tokenizer
takes every text apart before anything else: each part has the same ids in every text. In a part with marks, the
template's control tokens are sealed under names that no one can guess either, the marks become characters again, and a
copy of the tokenizer that knows the control tokens by these names alone makes the ids: those that the text would have
if the tokenizer had no control tokens. A part without marks takes the usual way.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from qingtune.data.control_tokens import ControlTokens
from qingtune.data.format import Message
from qingtune.data.sealed_tokenizer import NAME, SECRET, SealedTokenizer, name_of, sealed_copy
from qingtune.data.templates import Rendered, TemplateError, Turn
from qingtune.data.tokenizer_calls import encode, encode_many
from qingtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CUTS, LONGEST_CUT = 64, 64  # control tokens at which texts are cut, and their characters
_MARK = re.compile(f"\ufdd0{SECRET}:([0-9]+)\ufdd1")
_LEAVE_OUT = "Remove it from the text."


class Encoder:
    """A tokenizer with control tokens that cannot be forged.

    Args:
        tokenizer: with its chat template.
        control: its control tokens.
        closing: ids that the tokenizer puts after a text by itself.
        rows: of the model's embedding, one for each id it knows; None where no model is asked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control: ControlTokens,
        closing: Sequence[int] = (),
        rows: int | None = None,
    ) -> None:
        self._tokenizer, self._control, self._closing, self._rows = tokenizer, control, list(closing), rows
        self._normalizer = _normalizer_of(tokenizer, control)
        texts = [*control.ids]
        if self._normalizer is not None:
            texts += [self._normalizer.normalize_str(text) for text in control.ids]
        self._written = _pattern(control.ids)
        self._foreign = _pattern(texts)
        self._in_answers = _pattern(text for text in texts if text not in control.markup)

    def control_token_in(self, text: str, *, answer: bool = False) -> str | None:
        """The first control token that a text would hold; in an answer, other than those that models write there."""
        pattern = self._in_answers if answer else self._foreign
        found = pattern.search(text)
        if found is None and self._normalizer is not None:
            found = pattern.search(self._normalizer.normalize_str(text))
        return found[0] if found else None

    # --- Texts that a template writes --------------------------------------------------------------------------------

    def veil(self, messages: Sequence[Message]) -> list[Turn]:
        """The messages for a template to write, so that `ids` can distinguish their text from the template's own."""
        return [{"role": message.role, "content": self._veiled(message)} for message in messages]

    def _veiled(self, message: Message) -> str:
        """A content, marked where it holds a control token or would form one with what is written around it."""
        text, content = message.content, message.content.strip()
        first = len(text) - len(text.lstrip())
        places: set[int] = set()
        answer = message.role == "assistant"
        if self.control_token_in(text, answer=answer):
            pattern = self._in_answers if answer else self._foreign
            places = {found.start() for found in re.finditer(f"(?={pattern.pattern})", text)}
            places = places or {first}  # it comes of normalising; any mark keeps the tokenizer's own tokens from it
        heads, tails = self._control.heads, self._control.tails
        if content and heads and (content.startswith(heads) or any(head.startswith(content) for head in heads)):
            places.add(first)
        if content and tails and content.endswith(tails):
            places.add(first + len(content) - 1)
        if not places:
            return text
        return "".join(
            f"\ufdd0{SECRET}:{ord(letter)}\ufdd1" if place in places else letter for place, letter in enumerate(text)
        )

    def ids(self, text: str) -> list[int]:
        """Ids of what a template wrote of veiled messages.

        Raises:
            UserError: a content holds a control token's text, and this tokenizer cannot read that as text.
        """
        parts = [text[start:end] for start, end in pairwise([*self.cuts(text), len(text)])]
        return [number for ids in self.encoded(parts) for number in ids]

    def encoded(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of each of several parts of such texts; raises as `ids` does, and where the tokenizer fails on one."""
        usual = iter(encode_many(self._tokenizer, [part for part in parts if SECRET not in part]))
        return [self.sealed_ids(self.seal(part)) if SECRET in part else self.known(next(usual)) for part in parts]

    def seal(self, text: str) -> str:
        """What a template wrote of veiled messages: its control tokens under names that no other text holds.

        Raises:
            UserError: the template changed the marks, or this tokenizer cannot read control tokens' text as text.
        """
        if self._copy is None:
            if veiled := _MARK.search(text):
                raise _not_as_text(self.control_token_in(unveil(text[veiled.start() :])) or chr(int(veiled[1])))
            return text
        sealed = unveil(self._written.sub(lambda found: name_of(self._control.ids[found[0]]), text))
        if SECRET in NAME.sub("", sealed):
            raise UserError("the chat template rewrites it into a control token", fix=_LEAVE_OUT)
        return sealed

    def sealed_ids(self, text: str) -> list[int]:
        """Ids of a sealed text, before and after which other text may have been put.

        Raises:
            UserError: other control tokens would come of it than were sealed.
        """
        return self.known(encode(self._tokenizer, text) if self._copy is None else self._copy.ids(text))

    @cached_property
    def _copy(self) -> SealedTokenizer | None:
        """Made when it is first needed: a large vocabulary takes a second."""
        return sealed_copy(self._tokenizer, self._control.ids)

    def known(self, ids: list[int]) -> list[int]:
        """The ids, which the model has embeddings for.

        Raises:
            UserError: it has none for one of them.
        """
        if self._rows is not None and max(ids, default=0) >= self._rows:
            raise UserError(
                f"the tokenizer has more tokens than the model: id {max(ids)}, but the model has embeddings 0 to "
                f"{self._rows - 1}",
                fix="Use the model's own tokenizer.",
            )
        return ids

    # --- Plain text --------------------------------------------------------------------------------------------------

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a text without a template, after what the tokenizer puts before a text by itself.

        Raises:
            UserError: it holds a control token's text, and this tokenizer cannot read that as text.
        """
        if forged := self.control_token_in(text):
            if self._copy is None:
                raise _not_as_text(forged)
            return self._opened(self._copy.ids(text, add_special_tokens=True))
        return self.plain_encoded([text])[0]

    def plain_encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for each of several texts that hold no control token's text."""
        return [self._opened(ids) for ids in encode_many(self._tokenizer, texts, add_special_tokens=True)]

    def _opened(self, ids: list[int]) -> list[int]:
        """Ids of a text without those that the tokenizer puts after it by itself."""
        count = len(self._closing)
        return self.known(ids[:-count] if count and ids[-count:] == self._closing else ids)

    # --- Parts -------------------------------------------------------------------------------------------------------

    def cuts(self, text: str, first: int = 0) -> list[int]:
        """Where a text can be cut without changing its ids: `first`, and each cut after it."""
        return [first, *(found.start() for found in self._cuts.finditer(text, first) if found.start() > first)]

    @cached_property
    def _cuts(self) -> re.Pattern[str]:
        return _pattern(self._cut_texts)

    @cached_property
    def longest_cut(self) -> int:
        """Characters of the longest control token at which texts are cut."""
        return max(map(len, self._cut_texts), default=0)

    @cached_property
    def _cut_texts(self) -> list[str]:
        """The template's control tokens that the tokenizer takes out of a text as it is, whatever is around them."""
        if not self._tokenizer.is_fast or self._tokenizer.split_special_tokens:
            return []
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if token.content]
        found = [
            token.content
            for token in added
            if token.content in self._control.written
            and len(token.content) <= LONGEST_CUT
            and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            and not _belongs_to_words(token.content[0])
        ]
        covered = _covered(found[:MOST_CUTS], {token.content for token in added if not token.normalized})
        found = [text for text in found[:MOST_CUTS] if text not in covered]
        probe = "".join(f"{text}user\n Is it 12,345?  Yes!{text}\n\n{text} é" for text in found)
        whole = encode(self._tokenizer, probe)
        parts = [text for text in re.split(f"(?={_pattern(found).pattern})", probe) if text]
        return found if whole == [number for ids in encode_many(self._tokenizer, parts) for number in ids] else []


# --- The texts of a conversation, of which each mostly begins as the one before it -----------------------------------


class PartedTexts:
    """The texts of a conversation, each cut into parts by the encoder."""

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


def unveil(text: str) -> str:
    """Text with marks replaced by their characters."""
    return _MARK.sub(lambda found: chr(int(found[1])), text)


def _not_as_text(control_token: str) -> UserError:
    return UserError(f"holds {control_token}, which this model's tokenizer cannot read as text", fix=_LEAVE_OUT)


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of several texts at the first place of any."""
    longest_first = sorted(filter(None, set(texts)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _belongs_to_words(character: str) -> bool:
    """Whether a token before this character may be one of several letters, or take spaces along."""
    return character.isalnum() or character.isspace() or character == "_"


def _covered(texts: Sequence[str], tokens: Collection[str]) -> set[str]:
    """Those of a few tokens' texts whose beginning one of all tokens could hold, within or at its end."""
    beginnings = {text[:end] for text in texts for end in range(1, len(text))}
    longest = max(map(len, beginnings), default=0)
    ends = beginnings.intersection(token[-size:] for token in tokens for size in range(1, min(longest, len(token)) + 1))
    joined = "\0".join(tokens)
    return {text for text in texts if joined.count(text) > 1 or any(text[:end] in ends for end in range(1, len(text)))}


def _normalizer_of(tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> Any:
    """What changes a text before control tokens are looked for in it; None where nothing does."""
    if not tokenizer.is_fast:
        return None
    changed = any(token.normalized for token in tokenizer.added_tokens_decoder.values() if token.content in control.ids)
    return cast("Any", tokenizer).backend_tokenizer.normalizer if changed else None
