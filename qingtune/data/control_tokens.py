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
from qingtune.data.templates import TemplateError, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Sequence[Turn], bool], str]

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
        written: those that the template writes.
        markup: those that an answer may hold, as the model writes them itself: `<think>`, `<tool_call>`.
        heads: beginnings of a content that complete a control token with what the template writes before it, or with
            the end of the content before that.
        tails: ends of a content that begin one with what it writes after it.
    """

    ids: dict[str, int]
    written: frozenset[str]
    markup: frozenset[str]
    heads: tuple[str, ...]
    tails: tuple[str, ...]


def find_control_tokens(tokenizer: PreTrainedTokenizerBase, render: Render, stop_ids: Collection[int]) -> ControlTokens:
    """The control tokens of a tokenizer with its chat template.

    Args:
        render: writes turns, with or without what comes before an answer.
        stop_ids: ids at which generation stops.
    """
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content}
    named = {*tokenizer.all_special_ids}
    special = {token.content: number for number, token in added.items() if token.special or number in named}
    ordinary = {
        token.content: number
        for number, token in added.items()
        if token.content not in special and not all(c.isalnum() or c.isspace() or c in "▁_" for c in token.content)
    }
    rendered = [text for roles, prompt in _SHAPES if (text := _rendered(render, roles, prompt))]
    written = _found_in([*rendered, str(tokenizer.get_chat_template())], [*special, *ordinary])
    of_template = written & ordinary.keys()
    of_template |= {text for text in ordinary if _partner(text) in of_template}
    ids = special | {text: ordinary[text] for text in of_template}
    pieces = [re.split("|".join(_CONTENTS), text) for text in rendered]
    before = [piece for parts in pieces for piece in parts[:-1]]
    after = [piece for parts in pieces for piece in parts[1:]]
    between = {piece for parts in pieces for piece in parts[1:-1]}
    cuts = [(text[:place], text[place:]) for text in ids for place in range(1, len(text))]
    endings = {added[number].content for number in stop_ids if number in added}
    return ControlTokens(
        ids=ids,
        written=frozenset(written | of_template),
        markup=frozenset(of_template - _delimiters(render, of_template, endings)),
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


def _rendered(render: Render, roles: Sequence[Role], add_generation_prompt: bool = False) -> str:
    """Known contents in these roles as the template writes them; nothing where it refuses them."""
    turns = [{"role": role, "content": content} for role, content in zip(roles, _CONTENTS, strict=False)]
    try:
        return render(turns, add_generation_prompt)
    except TemplateError:
        return ""


def _found_in(texts: Sequence[str], tokens: Collection[str]) -> set[str]:
    return {token for token in tokens if any(token in text for text in texts)}


def _delimiters(render: Render, written: Collection[str], endings: set[str]) -> set[str]:
    """Those of the written tokens that set turns apart.

    A pair of tags in an answer's frame is none, as `<think>` and `</think>`, unless one of them occurs elsewhere too.
    """
    answered = _rendered(render, ("user", "assistant"))
    others = [_rendered(render, ("user",)), _rendered(render, ("system", "user"))]
    tool = _rendered(render, ("user", "assistant", "tool"))
    if tool.startswith(answered):
        others.append(tool[len(answered) :])
    sure = _found_in(others, written) | (endings & set(written))
    sure |= {text for text in written if _partner(text) in sure}
    around_answers = _found_in([answered, _rendered(render, ("user",), True)], written)
    return sure | {text for text in around_answers if _partner(text) not in written}


def _partner(text: str) -> str | None:
    """`</x>` for `<x>` and the other way round; None for what is no tag."""
    tag = _TAG.fullmatch(text)
    return f"<{'' if tag[1] else '/'}{tag[2]}>" if tag else None
