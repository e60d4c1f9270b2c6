"""Regular expressions of strangers, matched in a time that grows with the text and not faster.

Python's `re` tries one way through an expression after the other, and a short one can take it years. Here all ways
are followed at once, character by character (Thompson 1968, https://doi.org/10.1145/363347.363387), which needs the
expression to be a regular one: without references back and without looking around.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce

MOST_CHARACTERS = 300  # of an expression
MOST_STATES = 1000  # after counted repetitions are written out
_MOST_GROUPS = 30  # one within the other
# One character of the text: a class, an escape that is no letter or digit but those of kinds, or the character itself.
_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\\[^A-Za-z0-9]|[^\\\[(){*+?|^$]")
_GROUP = re.compile(r"\((?:\?:|\?P<[A-Za-z_]\w*>|(?!\?))")
_ANCHOR = re.compile(r"\^|\$|\\A|\\Z")
_TIMES = re.compile(r"([*+?]|\{(\d{1,4})?(?:(,)(\d{1,4})?)?\})(\??)")


class PatternError(ValueError):
    """An expression that is invalid or not supported here, with the reason."""


@dataclass
class _State:
    """A point on the way through an expression.

    Attributes:
        takes: whether a character leads on from here; None where none is needed.
        next: the states that it leads to.
        at: "start" or "end", where the way on is open there only.
    """

    takes: Callable[[str], bool] | None
    next: list[int]
    at: str | None = None


class Pattern:
    """An expression, to be compared with names.

    Raises:
        PatternError: it is invalid, too long, or not regular.
    """

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        # Names alone, as adapters written here hold them by the hundred, leave `re` one way only, and it is faster.
        self._name = re.compile(rf"(.*\.)?{text}$") if re.fullmatch(r"[\w.]*", text) else None
        self._states = parser.states
        self._anywhere = self._reached([parser.first], at_start=False)
        self._beginning = self._reached([parser.first], at_start=True)
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def ends(self, name: str) -> bool:
        """Whether a name is what the expression describes, or ends with it at a dot."""
        if self._name:
            return self._name.match(name) is not None
        now = self._beginning
        for character in name:
            now = self._step(now, character)
        return _Parser.DONE in self._reached(now, at_start=False, at_end=True)

    def _step(self, now: frozenset[int], character: str) -> frozenset[int]:
        key = now, character
        if key not in self._steps:
            taken = [self._states[number] for number in now]
            next_ones = [n for state in taken if state.takes and state.takes(character) for n in state.next]
            reached = self._reached(next_ones, at_start=False)
            self._steps[key] = reached | self._anywhere if character == "." else reached
        return self._steps[key]

    def _reached(self, numbers: Iterable[int], *, at_start: bool, at_end: bool = False) -> frozenset[int]:
        """The states that are reached from some without a character."""
        open_at = {None, "start" if at_start else None, "end" if at_end else None}
        reached, waiting = set[int](), list(numbers)
        while waiting:
            number = waiting.pop()
            if number in reached:
                continue
            reached.add(number)
            state = self._states[number]
            if state.takes is None and state.at in open_at:
                waiting += state.next
        return frozenset(reached)


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """The pattern of an expression.

    Raises:
        PatternError: it is invalid, too long, or not regular.
    """
    return Pattern(text)


@lru_cache(maxsize=1024)
def _takes(atom: str) -> Callable[[str], bool]:
    """Whether a character is one that an atom describes."""
    try:
        compiled = re.compile(atom)
    except re.error as error:
        raise PatternError(f"{atom} is not a character class ({error.msg})") from None
    known: dict[str, bool] = {}

    def takes(character: str) -> bool:
        if character not in known:
            known[character] = compiled.fullmatch(character) is not None
        return known[character]

    return takes


# A piece of an expression, given the state that follows it: makes the states of the piece, and returns their first.
_Piece = Callable[[int], int]


class _Parser:
    """Reads an expression into states; `first` is where it begins, DONE where it ends."""

    DONE = 0

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise PatternError(f"it has {len(text):,} characters; the limit is {MOST_CHARACTERS}")
        self.text, self.place, self.depth, self._built = text, 0, 0, 0
        self.states = [_State(None, [])]
        piece = self._alternatives()
        if self.place < len(text):
            raise PatternError(f"unbalanced parenthesis at position {self.place}")
        self.first = piece(self.DONE)

    # Reading

    def _take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        found = what.match(self.text, self.place)
        if found:
            self.place = found.end()
        return found

    def _repeats(self) -> bool:
        """Whether a repetition comes next; {} is none, but two characters."""
        return bool(_TIMES.match(self.text, self.place)) and not self.text.startswith("{}", self.place)

    def _alternatives(self) -> _Piece:
        choices = [self._sequence()]
        while self.text.startswith("|", self.place):
            self.place += 1
            choices.append(self._sequence())
        return choices[0] if len(choices) == 1 else lambda then: self._fork([choice(then) for choice in choices])

    def _sequence(self) -> _Piece:
        pieces: list[_Piece] = []
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            pieces.append(self._repeated(self._one()))
        return lambda then: reduce(lambda following, piece: piece(following), reversed(pieces), then)

    def _one(self) -> _Piece:
        if anchor := self._take(_ANCHOR):
            if self._repeats():
                raise PatternError(f"nothing to repeat at position {self.place}")
            at = "start" if anchor[0] in ("^", "\\A") else "end"
            return lambda then: self._add(_State(None, [then], at))
        if self._take(_GROUP):
            self.depth += 1
            if self.depth > _MOST_GROUPS:
                raise PatternError(f"its groups are nested more than {_MOST_GROUPS} deep")
            inner = self._alternatives()
            if not self.text.startswith(")", self.place):
                raise PatternError("a parenthesis is not closed")
            self.place += 1
            self.depth -= 1
            return inner
        if self._repeats():
            raise PatternError(f"nothing to repeat at position {self.place}")
        if atom := self._take(_ATOM):
            takes = _takes(atom[0])
            return lambda then: self._add(_State(takes, [then]))
        if self.text[self.place] == "{":  # as itself, where it counts nothing
            self.place += 1
            return lambda then: self._add(_State(_takes(r"\{"), [then]))
        raise PatternError(
            f"{self.text[self.place : self.place + 4]!r} at position {self.place} is not understood; names, dots, "
            "classes such as [0-9] and \\d, groups, |, *, +, ? and {m,n} are"
        )

    def _repeated(self, piece: _Piece) -> _Piece:
        if not self._repeats() or not (found := self._take(_TIMES)):
            return piece
        if self._repeats():
            raise PatternError(f"a repetition of a repetition at position {self.place}")
        sign = found[1]
        least = {"*": 0, "?": 0, "+": 1}.get(sign, int(found[2] or 0))
        most = {"*": None, "?": 1, "+": None}.get(sign, int(found[4]) if found[4] else None if found[3] else least)
        if most is not None and most < least:
            raise PatternError(f"{sign} ends before it begins")
        return lambda then: self._times(piece, least, most, then)

    # Building

    def _times(self, piece: _Piece, least: int, most: int | None, then: int) -> int:
        if most is None:
            loop = self._fork([then])
            self.states[loop].next.append(piece(loop))
            then = loop
        else:
            for _ in range(most - least):
                then = self._fork([piece(then), then])
        for _ in range(least):
            self._count()
            then = piece(then)
        return then

    def _fork(self, ways: list[int]) -> int:
        return self._add(_State(None, ways))

    def _add(self, state: _State) -> int:
        self._count()
        self.states.append(state)
        return len(self.states) - 1

    def _count(self) -> None:
        self._built += 1
        if self._built > MOST_STATES:
            raise PatternError("it has too many repetitions")
