"""Chat templates, which come with models and are code of strangers, rendered in a process of their own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qingtune.data.worker import Worker

SECONDS = 10.0  # that a few texts of a conversation may take; a usual one takes less than a ten-thousandth


class TemplateError(Exception):
    """A chat template that cannot be rendered; says why."""


@dataclass(frozen=True)
class Rendered:
    """The texts that a template writes of the turns of one conversation.

    Attributes:
        changes: each text as the number of characters that it shares with the one before it, and the rest.
        error: why the text after these could not be rendered; None where all were.
    """

    changes: Sequence[tuple[int, str]]
    error: str | None = None

    def only_text(self) -> str:
        """The text, where only one was asked for; TemplateError where it could not be rendered."""
        if self.error is not None:
            raise TemplateError(self.error)
        return self.changes[0][1]


Turn = Mapping[str, str]  # `role` and `content`
# A conversation's turns; and of each text how many of them it holds, and whether it ends with what comes before an
# answer.
Request = tuple[Sequence[Turn], Sequence[tuple[int, bool]]]


def render_template(
    template: str, variables: Mapping[str, str], turns: Sequence[Turn], *, add_generation_prompt: bool
) -> str:
    """A conversation as the template writes it.

    Args:
        variables: the tokenizer's special tokens by name.
        add_generation_prompt: whether to end with what comes before an answer.

    Raises:
        TemplateError: the template is broken, refuses the turns, or takes too long or too much memory.
    """
    (rendered,) = render_texts(template, variables, [(turns, [(len(turns), add_generation_prompt)])])
    return rendered.only_text()


def render_texts(template: str, variables: Mapping[str, str], requests: Sequence[Request]) -> list[Rendered]:
    """The texts of many conversations, as `render_template` renders each."""
    conversations = [{"messages": turns, "texts": texts} for turns, texts in requests]
    request = {"template": template, "variables": dict(variables), "conversations": conversations}
    reply: Any = _worker().ask(request)
    if reply is not None:
        return [Rendered(one["texts"], one.get("error")) for one in reply]
    if len(requests) == 1:
        return [Rendered((), f"it was stopped after {SECONDS:g} s, or its process ended")]
    return [rendered for one in requests for rendered in render_texts(template, variables, [one])]


@functools.cache
def _worker() -> Worker:
    return Worker("templates", SECONDS)
