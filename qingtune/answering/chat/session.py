"""The turns of a chat, and the prompts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qingtune.answering.thinking import OPENING
from qingtune.data.format import Message
from qingtune.data.tokenize import Template, prompt_ids
from qingtune.data.tokenizer_calls import decode

LONGEST_OPENING = 16  # tokens at a prompt's end among which a tag that opens the thinking is looked for


@dataclass
class ChatSession:
    """The turns of a chat, kept within the model's context.

    Attributes:
        template: makes the prompt, as in training.
        context_length: tokens that prompt and answer may take together.
        system_prompt: the first message, if any.
        turns: the questions and answers; thinking stays in an answer as the model wrote it, for the template to decide
            what later prompts show of it.
        asked: answers begun so far; each is drawn with its own seed.
    """

    template: Template
    context_length: int
    system_prompt: str | None = None
    turns: list[Message] = field(default_factory=list)
    asked: int = 0

    def messages(self) -> list[Message]:
        """All turns, the system message first."""
        system = [] if self.system_prompt is None else [Message("system", self.system_prompt)]
        return [*system, *self.turns]

    def prompt(self, room_for_answer: int) -> list[int]:
        """Ids for the next answer; the oldest turns are dropped for good until it fits, the last question never.

        Args:
            room_for_answer: tokens that the answer may take; at most half of the context is kept free for it.

        Raises:
            TemplateError: the model's template refuses these messages.
        """
        room = max(1, self.context_length - min(room_for_answer, self.context_length // 2))
        ids = prompt_ids(self.template, self.messages())
        while len(ids) > room and (end := self._end_of_first_exchange()):
            del self.turns[:end]
            ids = prompt_ids(self.template, self.messages())
        return ids

    def _end_of_first_exchange(self) -> int:
        """The place of the first question after an answer; 0 if there is none."""
        roles = [turn.role for turn in self.turns]
        later = range(1, len(roles))
        return next((place for place in later if roles[place - 1 : place + 1] == ["assistant", "user"]), 0)

    def opened_thinking(self, ids: Sequence[int]) -> str:
        """The tag with which a prompt itself opens the thinking, and the space after it; empty where it does not."""
        tail = decode(self.template.tokenizer, ids[-LONGEST_OPENING:])
        return tail[tail.rindex(OPENING) :] if tail.rstrip().endswith(OPENING) else ""

    def undo(self) -> Message | None:
        """Take back the last question and its answer; returns the question."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == "user":
                return turn
        return None
