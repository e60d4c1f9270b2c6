"""Which tokens control a conversation, found by looking at what the chat template writes around known contents.

A control token is one that the tokenizer marks as special, or another token of its added vocabulary that the template
writes: some models mark their turn delimiters as ordinary. Words and spaces in the added vocabulary are no markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qingtune.config.roles import Role
from qingtune.data.format import Message
from qingtune.data.templates import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Sequence[Message], bool], str]

# Contents by which a template is probed; no template writes these by itself.
_CONTENTS = tuple(f"\u3014{number}\u3015" for number in range(3))
_SHAPES: tuple[tuple[tuple[Role, ...], bool], ...] = (
    (("user",), True),
    (("system", "user"), True),
    (("user", "assistant"), False),
    (("user", "assistant", "user"), True),
    (("user", "assistant", "tool"), True),
)
_TAG = re.compile(r"<(/?)([\w-]+)>")


@dataclass(frozen=True)
class ControlTokens:
    """Control tokens, and where text and template could form one together.

    Attributes:
        ids: of each control token by its text.
        markup: those that an answer may hold, as the model writes them itself: `<think>`, `<tool_call>`.
        heads: beginnings of a content that complete a control token with what the template writes before it, or with
            the end of the content before that.
        tails: ends of a content that begin one with what it writes after it.
    """

    ids: dict[str, int]
    markup: frozenset[str]
    heads: tuple[str, ...]
    tails: tuple[str, ...]


def find_control_tokens(tokenizer: PreTrainedTokenizerBase, render: Render, stop_ids: Collection[int]) -> ControlTokens:
    """Look for the control tokens of a tokenizer with its chat template.

    Args:
        tokenizer: with its chat template.
        render: writes messages, with or without what stands before an answer.
        stop_ids: ids at which generation stops.
    """
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content}
    special = {token.content: number for number, token in added.items() if token.special}
    special |= {token.content: number for number, token in added.items() if number in tokenizer.all_special_ids}
    candidates = {
        token.content: number
        for number, token in added.items()
        if token.content not in special and not all(c.isalnum() or c.isspace() or c in "▁_" for c in token.content)
    }
    rendered = [text for roles, prompt in _SHAPES if (text := _rendered(render, roles, prompt)) is not None]
    written = _found_in([*rendered, str(tokenizer.get_chat_template())], candidates)
    written |= {text for text in candidates if _partner(text) in written}
    ids = special | {text: candidates[text] for text in written}
    pieces = [re.split("|".join(_CONTENTS), text) for text in rendered]
    before = [piece for parts in pieces for piece in parts[:-1]]
    after = [piece for parts in pieces for piece in parts[1:]]
    between = {piece for parts in pieces for piece in parts[1:-1]}
    cuts = [(text[:place], text[place:]) for text in ids for place in range(1, len(text))]
    return ControlTokens(
        ids=ids,
        markup=frozenset(written - _delimiters(render, written, {added[n].content for n in stop_ids if n in added})),
        heads=tuple(
            {end for start, end in cuts if any(piece.endswith(start) for piece in before)}
            | {
                end.removeprefix(piece)
                for _, end in cuts
                for piece in between
                if end.startswith(piece) and end != piece
            }
        ),
        tails=tuple({start for start, end in cuts if any(piece.startswith(end) for piece in after)}),
    )


def _rendered(render: Render, roles: Sequence[Role], add_generation_prompt: bool) -> str | None:
    """Known contents in these roles as the template writes them; None where it refuses them."""
    messages = [Message(role, content) for role, content in zip(roles, _CONTENTS, strict=False)]
    try:
        return render(messages, add_generation_prompt)
    except TemplateError:
        return None


def _found_in(texts: Sequence[str], candidates: Collection[str]) -> set[str]:
    return {candidate for candidate in candidates if any(candidate in text for text in texts)}


def _delimiters(render: Render, written: Collection[str], endings: set[str]) -> set[str]:
    """Those of the written tokens that set turns apart.

    A pair of tags in an answer's frame is none, as `<think>` and `</think>`, unless one of it stands elsewhere too.
    """
    user = _rendered(render, ("user",), False) or ""
    answered = _rendered(render, ("user", "assistant"), False) or ""
    others = [user, _rendered(render, ("system", "user"), False) or ""]
    tool = _rendered(render, ("user", "assistant", "tool"), False) or ""
    if tool.startswith(answered):
        others.append(tool[len(answered) :])
    sure = _found_in(others, written) | (endings & set(written))
    sure |= {text for text in written if _partner(text) in sure}
    around_answers = _found_in([answered, _rendered(render, ("user",), True) or ""], written)
    return sure | {text for text in around_answers if _partner(text) not in written}


def _partner(text: str) -> str | None:
    """`</x>` for `<x>` and the other way round; None for what is no tag."""
    tag = _TAG.fullmatch(text)
    return f"<{'' if tag[1] else '/'}{tag[2]}>" if tag else None
