"""Chat templates, which come with models and are code of strangers, rendered in a process of their own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from qingtune.data.worker import Worker

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 10.0  # that a conversation may take; a usual one takes a ten-thousandth


class TemplateError(Exception):
    """A chat template that cannot be rendered; says why."""


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
    request = {
        "template": template, "variables": dict(variables), "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }  # fmt: skip
    try:
        answer = _worker().ask(request)
    except BaseException:  # Ctrl-C, above all: the answer is still to come, and the next one to ask would get it
        _worker.cache_clear()
        raise
    if answer is None:
        _worker.cache_clear()
        raise TemplateError(f"it was stopped after {SECONDS:g} s, or ended its process")
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


@functools.cache
def _worker() -> Worker:
    return Worker(WORKER, SECONDS, needs="jinja2")
