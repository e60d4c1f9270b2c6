"""A chat on a script: lines as they would be typed, and a model that says what the test wants."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from conftest import CHATML, make_tokenizer

from qingtune.answering.chat.commands import ChatState
from qingtune.answering.chat.screen import Screen
from qingtune.answering.chat.session import ChatSession
from qingtune.answering.chat.talk import Chat
from qingtune.answering.generate import Answer, Decoding
from qingtune.data.tokenize import Template, make_template
from qingtune.errors import UserError

END = 2  # the id of <|im_end|>
CTRL_C = "<Ctrl-C>"  # in a reply: pressed at this place

Before = Callable[[], None]


@dataclass
class Script:
    """Lines of a chat; a function among them is called when its turn comes, and no line."""

    lines: list[str | Before]
    recorded: list[bool] = field(default_factory=list)

    def read(self, *, recorded: bool) -> str | None:
        self.recorded.append(recorded)
        while self.lines:
            line = self.lines.pop(0)
            if isinstance(line, str):
                return line
            line()
        return None

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Model:
    """Gives its replies in turn; keeps the prompts it was shown, as text, and how it was to draw."""

    template: Template
    context_length: int
    replies: list[str | Iterable[int]]
    prompts: list[str] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)

    def answer(self, ids: Sequence[int], decoding: Decoding) -> Answer:
        if len(ids) >= self.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the model's context is {self.context_length}", fix="Shorten it."
            )
        self.prompts.append(self.template.tokenizer.decode(list(ids)))
        self.decodings.append(decoding)
        reply = self.replies.pop(0)
        return Answer(self.template, self._tokens(reply) if isinstance(reply, str) else reply)

    def _tokens(self, reply: str) -> Iterator[int]:
        before, ctrl_c, after = reply.partition(CTRL_C)
        yield from self.template.tokenizer(before, add_special_tokens=False)["input_ids"]
        if ctrl_c:
            signal.raise_signal(signal.SIGINT)
        yield from self.template.tokenizer(after, add_special_tokens=False)["input_ids"]
        yield END


@dataclass
class Talk:
    """A chat that was talked."""

    model: Model
    state: ChatState
    script: Script

    @property
    def turns(self) -> list[str]:
        return [turn.content for turn in self.state.session.turns]


def make_state(chat_template: str = CHATML, context_length: int = 2000, system_prompt: str | None = None) -> ChatState:
    template = make_template(make_tokenizer(chat_template), [END])
    return ChatState(ChatSession(template, context_length, system_prompt), Decoding(seed=7))


def talk(
    lines: list[str | Before],
    replies: Sequence[str | Iterable[int]] = (),
    *,
    state: ChatState | None = None,
    live: bool = False,
) -> Talk:
    """Talk the lines to the end; at most as many answers are asked for as there are replies."""
    state = state or make_state()
    model, script = Model(state.session.template, state.session.context_length, list(replies)), Script(list(lines))
    Chat(model.answer, state, script, Screen(live=live)).talk()
    return Talk(model, state, script)
