"""UserError: an error that the user can fix."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """What is wrong, where, and how to fix it. The command line shows it without a traceback and exits with 2.

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


def reason_of(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shorten(" ".join(lines), 300) if lines else type(error).__name__


_SIGNS_OF_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch has a class for it on GPUs only."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError | RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)
