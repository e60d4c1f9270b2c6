"""Libraries at work on the files of strangers: any error of theirs is a fault of the files, reported in one line."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qingtune.errors import UserError, is_out_of_memory, reason_of


@contextmanager
def foreign_files(what: str, where: Path, fix: str | None = None) -> Generator[None]:
    """Turn what a library raises on a file into a UserError that keeps the reason.

    Only calls into libraries belong inside: their errors on broken files are of every class, from KeyError to
    ZeroDivisionError, and do not show whether the file is at fault. A lack of memory is passed on.

    Args:
        what: could not be done, such as "the model cannot be loaded".
        where: the file or folder.
        fix: what the user can do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise UserError(f"{what} ({kind}{reason_of(error)})", where=str(where), fix=fix) from error
