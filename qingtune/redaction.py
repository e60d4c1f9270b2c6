"""Keep tokens and passwords out of what is shown and written, wherever a library or a traceback might repeat them."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters of a secret in the environment; shorter values would be found in ordinary words
_NAMES = re.compile(r"TOKEN(?!IZER)|SECRET|PASSWO?R?D|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_PLACES = ("FILE", "PATH", "DIR", "URL", "ENDPOINT")  # variables that say where a secret lies
_SHAPES = (
    (re.compile(r"(?<=://)[^/\s@\"']+(?=@)"), HIDDEN),  # user and password in a URL
    (re.compile(r"([?&][\w.-]*(?:token|key|secret|password|signature|sig)=)[^&\s\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization\W+(?:bearer|basic)\s+)[\w.~+/=-]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # Hugging Face, OpenAI and alike, GitHub, GitLab, AWS, Slack; a Chinese character before it is no part of a token
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA|xox[abp]-)[\w-]{10,}", re.ASCII), HIDDEN),
)


def redact(text: str) -> str:
    """The text with three stars for each secret: values of such environment variables, and what looks like a token."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


def _secrets_of_environment() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _NAMES.search(name) and not name.upper().endswith(_PLACES)
    }
    return sorted(values, key=len, reverse=True)


def redact_values(value: Any) -> Any:
    """The same for every text in a JSON value."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(item) for key, item in value.items()}
    return [redact_values(item) for item in value] if isinstance(value, list) else value
