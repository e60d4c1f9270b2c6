"""The error of users: a fault that the person at the keyboard can mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Says what is wrong, where, and how to mend it. The command line shows it without a traceback and exits with 2.

    The message reads `where: what. fix`, for example
    `data/train.jsonl:118: "output" is empty. Fix the row or pass --on_bad_row skip.`
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        sentence = what if what.endswith((".", "?", "!")) or fix is None else f"{what}."
        super().__init__(f"{where}: " * (where is not None) + sentence + (f" {fix}" if fix else ""))


def shorten(text: str, most: int = 80) -> str:
    """What a user gave, cut in the middle so that a message stays a message."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]} ({len(text):,} characters)"


MOST_PROBLEMS = 20  # that are shown


def raise_all(problems: Sequence[UserError]) -> None:
    """Raise the problems of the list as one UserError, a line each, those after the first 20 counted.

    Does nothing for an empty list.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [str(problem) for problem in problems[:MOST_PROBLEMS]]
        if rest := len(problems) - len(lines):
            lines.append(f"and {rest:,} more")
        raise UserError("\n".join(lines))
