"""Ollama's Modelfile: the chat template in Go's template language, stop tokens, system prompt and sampling.

A model's own template is Jinja, which Ollama does not read. What it does is found out by rendering conversations of
known contents and looking at the text between these; a template that does not just write turn after turn is left
out rather than guessed.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qingtune.config.roles import Role
from qingtune.data.format import Message
from qingtune.data.templates import TemplateError

Render = Callable[[Sequence[Message], bool], str]

_QUOTES = '"""'
GO_PLAIN = "{{ .Prompt }}"  # for models trained on plain text
# Contents by which a template is probed; no template writes these by itself.
_SYSTEM, _USER, _ANSWER, _AGAIN = (f"\u3014{number}\u3015" for number in range(4))
_TODAY = ("strftime_now", "date_string")
# Contents that templates are known to change: each with the words that tell so.
_CHANGED = {
    " spaces around \n": "spaces and line breaks at the edges of a text",
    "<think>\na\n</think>\n\nb": "thoughts (<think> ... </think>) in earlier answers",
}


class TemplateNotExpressible(Exception):
    """A chat template that Go's language cannot be made to render alike; says why."""


@dataclass(frozen=True)
class Turns:
    """A chat template as the text around each turn.

    Attributes:
        opening: comes first if the first message is not the system's.
        around: what comes before and after the content of a turn, by role: system, user, assistant.
        prompt: before the answer to be made.
        changed: what the model's own template does to some contents and this does not.
    """

    opening: str
    around: Mapping[str, tuple[str, str]]
    prompt: str
    changed: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation up to the answer to be made."""
        text = self.opening if messages[0].role != "system" else ""
        for message in messages:
            before, after = self.around[message.role]
            text += before + message.content + after
        return text + self.prompt

    def go_template(self) -> str:
        """The same in Go's template language with Ollama's variables."""
        parts = ["{{ range $i, $_ := .Messages }}"]
        if self.opening:
            parts.append('{{ if and (eq $i 0) (ne .Role "system") }}' + _literal(self.opening) + "{{ end }}")
        for word, (role, (before, after)) in zip(("if", "else if", "else if"), self.around.items(), strict=True):
            parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}')
        return "".join([*parts, "{{ end }}{{ end }}", _literal(self.prompt)])


def _literal(text: str) -> str:
    """Text that a Go template writes as it is; a brace at its end must not open what follows."""
    text = text.replace("{{", '{{ "{{" }}')
    return f'{text[:-1]}{{{{ "{{" }}}}' if text.endswith("{") else text


def find_turns(template: str, render: Render, bos: str | None) -> Turns:
    """Find out what a chat template writes around each turn.

    Args:
        template: Jinja, looked at for words only.
        render: writes messages, with or without what comes before an answer.
        bos: text of the token that llama.cpp puts before a prompt by itself, to be left out here; None if it does not.

    Raises:
        TemplateNotExpressible: its turns do not simply follow one another.
    """
    if any(word in template for word in _TODAY):
        raise TemplateNotExpressible("it writes today's date")
    system, user, answer, again = (
        Message("system", _SYSTEM), Message("user", _USER), Message("assistant", _ANSWER), Message("user", _AGAIN)
    )  # fmt: skip
    try:
        alone = render([user], False)
        opening, after_user = _cut(alone, _USER)
        prompt = _between(render([user], True), alone, "")
        before_system, after_system, after_user_and_more, after_answer, end = _cut(
            render([system, user, answer, again], True), _SYSTEM, _USER, _ANSWER, _AGAIN
        )
        after_answer_at_end = _cut(render([user, answer], False), _ANSWER)[1]
    except TemplateError as error:
        raise TemplateNotExpressible(f"it refuses a conversation ({error})") from None
    before_user = _between(after_answer, after_answer_at_end, "")
    turns = Turns(
        opening=_between(opening, "", before_user),
        around={
            "system": (before_system, _between(after_system, "", before_user)),
            "user": (before_user, after_user),
            "assistant": (_between(after_user_and_more, after_user, ""), after_answer_at_end),
        },
        prompt=prompt,
    )
    if end != after_user + prompt:
        raise TemplateNotExpressible("a later turn is written differently than the first")
    if reason := _why_not_quoted(turns.go_template()):
        raise TemplateNotExpressible(f"it writes {reason}")
    turns = replace(turns, changed=_compare(turns, render))
    return _without_bos(turns, bos) if bos else turns


def _cut(text: str, *contents: str) -> list[str]:
    """The pieces of a text between contents that each occur in it once, in order."""
    pieces: list[str] = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found or content in text:
            raise TemplateNotExpressible("it does not write each message once, in order")
        pieces.append(piece)
    return [*pieces, text]


def _between(text: str, start: str, end: str) -> str:
    if not text.startswith(start) or not text.endswith(end):
        raise TemplateNotExpressible("what it writes around a turn depends on the turns around it")
    return text[len(start) : len(text) - len(end)]


def _compare(turns: Turns, render: Render) -> tuple[str, ...]:
    """What the template does to contents that these turns leave alone; it may not differ in more than that."""
    plain = ("Hi.", "two\nlines", "你好，世界 🥖", "{{ .Role }} {% if %}")
    shapes: tuple[tuple[Role, ...], ...] = (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    )
    for shape, first in itertools.product(shapes, range(len(plain))):
        messages = [Message(role, plain[(first + place) % len(plain)]) for place, role in enumerate(shape)]
        if not _alike(turns, render, messages):
            raise TemplateNotExpressible("what it writes around a turn depends on its content")
    return tuple(
        words
        for content, words in _CHANGED.items()
        if not all(_alike(turns, render, [Message(role, content) for role in shape]) for shape in shapes)
    )


def _alike(turns: Turns, render: Render, messages: Sequence[Message]) -> bool:
    try:
        return render(messages, True) == turns.render(messages)
    except TemplateError:
        return False


def _without_bos(turns: Turns, bos: str) -> Turns:
    """The turns without the token that llama.cpp puts in front itself."""
    before, after = turns.around["system"]
    for place, always in ((before, ""), (turns.opening, "always ")):
        if not place.startswith(bos):
            raise TemplateNotExpressible(f"it does not {always}begin with the token that the model's texts begin with")
    around = {**turns.around, "system": (before.removeprefix(bos), after)}
    return replace(turns, opening=turns.opening.removeprefix(bos), around=around)


# --- The file --------------------------------------------------------------------------------------------------------


def _why_not_quoted(text: str) -> str | None:
    """What a Modelfile cannot hold of a text between quotes; None where it can.

    Ollama's parser ends such a text at the first line that closes the quotes, and drops what Go does not print.
    """
    if _QUOTES in text:
        return f"{_QUOTES}, with which a Modelfile ends a text"
    dropped = sorted({letter for letter in text if letter not in "\n\r\t" and not _printed(letter)})
    return f"{', '.join(f'U+{ord(letter):04X}' for letter in dropped[:3])}, which Ollama drops" if dropped else None


def _printed(letter: str) -> bool:
    return letter == " " or unicodedata.category(letter)[0] in "LMNPS"


def _quoted(text: str) -> str:
    """A value that holds no more than its text: a quote or the end of a line cannot end it before its end."""
    return f'"{text}"' if not re.search('["\n\r]', text) else _QUOTES + text + _QUOTES


def left_out(stops: Sequence[str], system_prompt: str | None) -> list[str]:
    """What a Modelfile cannot hold or loses of these, a sentence each."""
    found: list[str] = []
    for stop in stops:
        if reason := _why_not_quoted(stop):
            found.append(f"A stop text is omitted from the Modelfile, because it contains {reason}.")
    if system_prompt and (reason := _why_not_quoted(system_prompt)):
        what = "No SYSTEM in the Modelfile, as" if _QUOTES in system_prompt else "Ollama changes the SYSTEM text, as"
        found.append(f"{what} the system prompt of training holds {reason}.")
    return found


def modelfile(
    gguf: str,
    template: str | None,
    remarks: Sequence[str],
    stops: Sequence[str],
    system_prompt: str | None,
    sampling: Mapping[str, float],
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the file next to it.
        template: in Go's template language; None to leave it to Ollama.
        stops: texts at which an answer ends.
        sampling: Ollama's parameters.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf}", "", *(f"# {_one_line(text)}" for text in remarks)]
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if not _why_not_quoted(stop)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    if system_prompt and _QUOTES not in system_prompt:
        lines.append(f"SYSTEM {_QUOTES}{system_prompt}{_QUOTES}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """A comment, which ends where its line does."""
    return "".join(letter if _printed(letter) else " " for letter in text)
