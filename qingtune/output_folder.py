"""The folder that a run writes to: whether it may, that no other run does, and what an earlier one left there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qingtune.errors import UserError, shorten
from qingtune.files import open_in_place, refuse_links
from qingtune.record import CURVE, FACTS, LATEST, METRICS, PAGE, RECORD, SAMPLES, SETTINGS, WEIGHTS_REMOVED

LOCK = ".qingtune.lock"
# All that a run leaves in its folder.
_WRITTEN = (
    SETTINGS, RECORD, METRICS, CURVE, LATEST, FACTS, PAGE, SAMPLES, "checkpoint-*", "trackers", "adapter_config.json",
    "adapter_model.safetensors", "model*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "demo_answers.json",
    "evaluation.json", "evaluation.md", "predictions_before.jsonl*", "predictions_after.jsonl*", WEIGHTS_REMOVED,
)  # fmt: skip
# What a run that was killed while it wrote leaves besides.
_HALF_DONE = (".checkpoint-*", ".result-*", ".*.tmp")


def check_output_folder(
    output_dir: Path, *, overwrite: bool, first_file: str = SETTINGS, what: str = "a training run"
) -> None:
    """Make sure before anything is loaded that the result may and can be written.

    Args:
        first_file: what is written first; with it in the folder, the rest is of an earlier start.
        what: makes such folders, in words.

    Raises:
        UserError: the folder holds something else, is no folder, or cannot be written.
    """
    try:
        existing = next(place for place in (output_dir, *output_dir.absolute().parents) if os.stat(place))
    except (FileNotFoundError, NotADirectoryError):
        existing = next(place for place in output_dir.absolute().parents if place.exists())
    except (OSError, ValueError) as error:  # a name too long, or with a null byte in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"output_dir is no path ({reason})", where=shorten(str(output_dir))) from None
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError("output_dir is a file", where=str(output_dir), fix="Choose another output_dir.")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError("output_dir cannot be written", where=str(existing), fix="Choose another output_dir.")
    if first_file == SETTINGS:
        refuse_links(output_dir, (SETTINGS, RECORD, METRICS, CURVE, LATEST, FACTS, PAGE, SAMPLES, "trackers"))
    if output_dir.is_dir() and _holds_files_of_others(output_dir, first_file):
        raise UserError(
            f"output_dir holds files that are not of {what}; they are left alone" + overwrite * ", all the same",
            where=str(output_dir),
            fix="Choose another output_dir.",
        )


def _holds_files_of_others(output_dir: Path, first_file: str) -> bool:
    """Whether there is anything although no run has begun here."""
    if (output_dir / first_file).exists():
        return False
    ours = {output_dir / LOCK, *(path for pattern in _HALF_DONE for path in output_dir.glob(pattern))}
    return any(path not in ours for path in output_dir.iterdir())


@contextmanager
def only_run_in(output_dir: Path) -> Generator[None]:
    """Keep other runs out of the folder, which is made if need be and removed again if nothing came into it.

    The lock is the operating system's and ends with the process, however that ends.

    Raises:
        UserError: another run has the folder.
    """
    import filelock

    made = [place for place in (output_dir, *output_dir.absolute().parents) if not place.exists()]
    path = output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(output_dir, [LOCK])
        lock = filelock.FileLock(path, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another run is writing to this output_dir ({_holder(path)})",
            where=str(output_dir),
            fix="Wait for it, or choose another output_dir.",
        ) from None
    except OSError as error:  # permissions do not tell all: a read-only disk, a file system that is none
        raise UserError(
            f"output_dir cannot be written ({error.strerror})", where=str(output_dir), fix="Choose another output_dir."
        ) from None
    try:
        with open_in_place(path) as file:
            file.truncate()
            file.write(f"process {os.getpid()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        for place in made:
            if any(place.iterdir()):
                break
            place.rmdir()


def who_writes_to(output_dir: Path) -> str | None:
    """The run that has the folder, in words; None if none does."""
    import filelock

    path = output_dir / LOCK
    if not path.exists():
        return None
    try:
        with filelock.FileLock(path, timeout=0):
            return None
    except filelock.Timeout:
        return _holder(path)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "it is just starting"
    except OSError:  # Windows does not let others read a locked file
        return "see the task manager"


def prepare_output_folder(output_dir: Path, *, anew: bool) -> None:
    """Remove what a killed run left half done; `anew` removes an earlier run's files too, and no others."""
    patterns = [*_HALF_DONE, *(_WRITTEN if anew else ())]
    for path in [path for pattern in patterns for path in output_dir.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
