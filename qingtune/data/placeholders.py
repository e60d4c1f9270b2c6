"""Placeholders of templates that were never filled in, such as {{name}}, found in prose and not in code."""

from __future__ import annotations

import re

import regex

_NAME = r"[A-Za-z_\p{Han}][\w.\- ]{0,39}"
_PLACEHOLDER = regex.compile(
    rf"(?<![\\}}A-Za-z0-9_^$]){{{{\s*{_NAME}\s*}}}}(?!}})"  # {{name}}
    rf"|\$\{{{_NAME}\}}"  # ${name}
    r"|\{%-? *[a-z][^%\n]{0,80}%\}"  # {% if name %}
    r"|<(?:INSERT|YOUR)[ _][A-Z _]{1,40}>"
    r"|\[(?:INSERT|YOUR)[ _][A-Z _]{1,40}\]"
    r"|[\[【](?:插入|在此插入|在此填写|请填写)[^\]】\n]{0,40}[\]】]"
)
_MEDIA = re.compile(r"<(?:image|video|audio)>")
_CODE_BLOCK = re.compile(r"(```|~~~).*?(?:\1|\Z)|`[^`\n]*`|\$\$.*?\$\$", re.DOTALL)
_CODE = re.compile(r"[;={}<>\\]|\(\)|^\s*(?:#|//|\$ )")  # on a line, apart from its placeholders


def _may_hold_one(text: str) -> bool:
    """A quick look, as nearly all texts hold none."""
    return (
        "{{" in text or "${" in text or "{%" in text or "INSERT" in text or "YOUR" in text
        or "插入" in text or "填写" in text or "<image>" in text or "<video>" in text or "<audio>" in text
    )  # fmt: skip


def first_placeholder(text: str, *, asked: bool) -> str | None:
    """The first placeholder in the prose of a text; in a turn that asks, a bare <image> is one, too."""
    if not _may_hold_one(text):
        return None
    if asked and (media := _MEDIA.search(text)):
        return media[0]
    for line in _CODE_BLOCK.sub(" ", text).split("\n"):
        found = _PLACEHOLDER.search(line)
        if found and not _CODE.search(_PLACEHOLDER.sub(" ", line)):
            return found[0]
    return None
