"""The chat: takes messages, obeys commands, shows answers as they come, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qingtune.answering.chat.commands import ChatState, find_command
from qingtune.answering.chat.lines import Lines, PlainLines, TerminalKind, terminal_kind
from qingtune.answering.chat.screen import AnswerView, Screen
from qingtune.answering.chat.session import ChatSession
from qingtune.answering.generate import Answer, Decoding
from qingtune.answering.thinking import split_thinking
from qingtune.data.format import Message
from qingtune.data.templates import TemplateError
from qingtune.errors import UserError, is_out_of_memory
from qingtune.machine.signals import Interruptible

AnswerFunction = Callable[[Sequence[int], Decoding], Answer]


def chat(answer: AnswerFunction, session: ChatSession, decoding: Decoding) -> None:
    """Talk until /exit or the end of input.

    Args:
        session: changed in place.
        decoding: until /set changes it; each answer has its own seed.
    """
    kind = terminal_kind()
    screen = Screen(live=kind == "full")
    if kind != "none":
        screen.note("Type a message, or /help.")
    Chat(answer, ChatState(session, decoding), _lines(kind, screen), screen).talk()


def _lines(kind: TerminalKind, screen: Screen) -> Lines:
    if kind == "full":
        from qingtune.answering.chat.editor import EditedLines  # prompt_toolkit, which nothing else needs

        return EditedLines(screen.note)
    return PlainLines(screen.note, prompted=kind == "plain")


@dataclass(frozen=True)
class Chat:
    """A chat and what it runs on."""

    answer: AnswerFunction
    state: ChatState
    lines: Lines
    screen: Screen

    def talk(self) -> None:
        """Read and answer until the end."""
        with self.lines.quiet():
            while self._go_on():
                pass

    def _go_on(self) -> bool:
        """Read a line and do what it says; returns whether the chat continues."""
        try:
            line = self.lines.read(recorded=self.state.options.history == "on")
            try:
                return line is not None and self._take(line)
            except UserError as error:
                self.screen.note(str(error))
        except KeyboardInterrupt:  # during a command
            self.screen.note("[stopped]")
        return True

    def _take(self, line: str) -> bool:
        """Send a message or obey a command; returns whether the chat continues."""
        try:
            line.encode()
        except UnicodeEncodeError:  # bytes that are no text come as halves of surrogate pairs
            raise UserError("That was not UTF-8 text.") from None
        if line.startswith("/") and not line.startswith("//"):
            command, text = find_command(line)
            if command.obey:
                self.screen.note(command.obey(self.state, text))
            elif command.name == "/retry":
                self._retry()
            return command.name != "/exit"
        if line.strip():
            self._ask(Message("user", line.removeprefix("/")), list(self.state.session.turns))
        return True

    def _retry(self) -> None:
        before = list(self.state.session.turns)
        question = self.state.unanswered or self.state.session.undo()
        if question is None:
            self.screen.note("[nothing to retry]")
            return
        if self.state.decoding.temperature == 0:
            self.screen.note("[temperature is 0: the same prompt gives the same answer]")
        self._ask(question, before)

    def _ask(self, question: Message, before: list[Message]) -> None:
        """Put a question that is not among the turns, show its answer, keep both; `before`: the turns if none comes."""
        ctrl_c = Interruptible()
        answered_before = any(turn is question for turn in before)
        lost = "no new answer; the earlier one is kept" if answered_before else "no answer yet; /retry asks again"
        with ctrl_c.handling():
            state, session = self.state, self.state.session
            answer = ""
            session.turns.append(question)
            try:
                answer, broken_off = self._answer(ctrl_c)
            except TemplateError as error:
                raise UserError(f"the model's chat template refuses this: {error}") from None
            finally:
                kept = bool(split_thinking(answer)[1].strip())
                if kept:
                    session.turns.append(Message("assistant", answer))
                else:
                    session.turns = before
                state.unanswered = None if kept or answered_before else question
            if broken_off or not kept:
                outcome = "the answer so far is kept" if kept else lost
                self.screen.note(f"[{broken_off or 'the model ended its turn'}; {outcome}]")

    def _answer(self, ctrl_c: Interruptible) -> tuple[str, str]:
        """Show the answer to the session's turns; returns its text, and why it was broken off, if it was."""
        session, decoding = self.state.session, self.state.decoding
        turns = len(session.turns)
        ids = session.prompt(decoding.max_new_tokens)
        opening = session.opened_thinking(ids)
        stream = self.answer(ids, replace(decoding, seed=decoding.seed + session.asked))
        session.asked += 1
        if dropped := turns - len(session.turns):
            self.screen.note(f"[the context is full: the {dropped} oldest turns were dropped]")
        view = AnswerView(self.screen, show_thinking=self.state.options.thinking == "show", opened=bool(opening))
        shown, broken_off = 0, ""
        began, first = time.perf_counter(), None
        try:
            for piece in ctrl_c.pieces(iter(stream)):
                first = first or (time.perf_counter(), len(stream.tokens))
                view.show(piece)
                shown += len(piece)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            broken_off = "out of memory"
        view.show(stream.text[shown:])  # a piece that Ctrl-C kept from coming
        view.close()
        if self.state.options.stats == "on":
            self.screen.note(_speed(len(ids), began, first, len(stream.tokens)))
        if ctrl_c.pressed and not stream.ended:
            broken_off = "stopped"
        elif not broken_off and not stream.ended:
            full = len(stream.tokens) < decoding.max_new_tokens
            broken_off = "the context is full" if full else "cut at max_new_tokens (change it with /set)"
        return opening + stream.text, broken_off


def _speed(prompt: int, began: float, first: tuple[float, int] | None, tokens: int) -> str:
    """Of the prompt until the first text, with moment and tokens in `first`, and of the tokens after that."""
    now = time.perf_counter()
    moment, at_first = first or (now, tokens)
    rate = f", {(tokens - at_first) / (now - moment):.1f} tokens/s" if tokens > at_first else ""
    return f"[{prompt:,} tokens in, first text after {moment - began:.2f} s; {tokens:,} out{rate}]"
