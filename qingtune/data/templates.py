"""Chat templates, which come with models and are code of strangers, rendered in a process of their own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingtune.data.worker import Worker

WORKER = Path(__file__).with_name("template_worker.py")
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

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            TemplateError: where one could not be rendered, in its place.
        """
        text = ""
        for shared, rest in self.changes:
            text = text[:shared] + rest
            yield text
        if self.error is not None:
            raise TemplateError(self.error)


# A conversation's messages, each with role and content; and of each text how many of them it holds, and whether it ends
# with what stands before an answer.
Request = tuple[Sequence[Mapping[str, str]], Sequence[tuple[int, bool]]]


def render_template(
    template: str, variables: Mapping[str, str], messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """A conversation as the template writes it.

    Args:
        template: Jinja.
        variables: the tokenizer's special tokens by name.
        messages: each with role and content.
        add_generation_prompt: whether to end with what stands before an answer.

    Raises:
        TemplateError: the template is broken, refuses the messages, or takes too long or too much memory.
    """
    (rendered,) = render_texts(template, variables, [(messages, [(len(messages), add_generation_prompt)])])
    return next(iter(rendered))


def render_texts(template: str, variables: Mapping[str, str], requests: Sequence[Request]) -> list[Rendered]:
    """The texts of many conversations, as `render_template` renders each."""
    conversations = [
        {"messages": [dict(message) for message in messages], "texts": texts} for messages, texts in requests
    ]
    request = {"template": template, "variables": dict(variables), "conversations": conversations}
    reply: Any = None
    try:
        reply = _worker().ask(request)
    finally:
        if reply is None:  # also after Ctrl-C, as the reply is still to come and the next request would get it
            _worker.cache_clear()
    if reply is not None:
        return [Rendered(one["texts"], one.get("error")) for one in reply]
    if len(requests) == 1:
        return [Rendered((), f"it was stopped after {SECONDS:g} s, or its process ended")]
    return [rendered for one in requests for rendered in render_texts(template, variables, [one])]


@functools.cache
def _worker() -> Worker:
    return Worker(WORKER, SECONDS, needs="jinja2")
