"""The names that rows of data give to the speakers of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether a turn, in the form of OpenAI's messages or of ShareGPT, is the model's."""
    return ROLES.get(str(turn.get("role", turn.get("from")))) == "assistant"
