"""The folder that a run writes to: whether it may, that no other run does, and what an earlier one left there."""

from __future__ import annotations

import fnmatch
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qingtune.errors import UserError
from qingtune.files.digests import MANIFEST
from qingtune.files.json_files import INDEX_BYTES, read_object
from qingtune.files.paths import refuse_no_path, refuse_same_file
from qingtune.files.staging import usual_permissions
from qingtune.files.write import open_in_place, refuse_links
from qingtune.output.console import say
from qingtune.runs.record import (
    CURVE,
    FACTS,
    LATEST,
    METRICS,
    PAGE,
    RECORD,
    SAMPLES,
    SETTINGS,
    WEIGHTS_REMOVED,
    read_record,
)
from qingtune.runs.result_folder import RESULT_FILES, Listed, list_files, remove_empty_folders, shown

_MAKER = "train"  # in lists of results
_TRACKERS = "trackers"  # a folder, in which users may keep files of their own
LOCK = ".qingtune.lock"
# What a run, and an evaluation of its result, write there in addition to the result.
_WORKING = (
    SETTINGS, RECORD, METRICS, CURVE, LATEST, FACTS, PAGE, SAMPLES, RESULT_FILES, WEIGHTS_REMOVED, _TRACKERS,
    "demo_answers.json", "evaluation.json", "evaluation.md", "predictions_before.jsonl", "predictions_after.jsonl",
    "predictions_before.jsonl.unfinished.json", "predictions_after.jsonl.unfinished.json",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)  # fmt: skip
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
# What a run that was killed while it wrote leaves; the second and third form are of version 0.1.0.
_HALF_DONE = re.compile(
    r"\.((checkpoint-\d+|result)-([0-9a-f]{16}\.unfinished|\w{8})|qingtune-[0-9a-f]{16}\.tmp|"
    rf"({'|'.join(map(re.escape, _WORKING[:8]))})\.tmp)"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Settings that every run writes and that nobody gives all together.
_MARKS = {"model_name_or_path", "output_dir", "dry_run", "resume_from_checkpoint", "overwrite_output_dir", "seed"}


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
    refuse_no_path(output_dir, "output_dir")
    existing = next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists())
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError("output_dir is a file", where=str(output_dir), fix="Choose another output_dir.")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError("output_dir cannot be written", where=str(existing), fix="Choose another output_dir.")
    if first_file == SETTINGS:
        refuse_links(output_dir, (SETTINGS, RECORD, METRICS, CURVE, LATEST, FACTS, PAGE, SAMPLES, _TRACKERS))
    begun = is_run(output_dir) if first_file == SETTINGS else (output_dir / first_file).exists()
    around = output_dir.iterdir() if output_dir.is_dir() and not begun else ()
    if any(path.name != LOCK and not _HALF_DONE.fullmatch(path.name) for path in around):
        also = " (also with --overwrite_output_dir)" * overwrite
        text = f"output_dir contains files that do not belong to {what}; they are kept{also}"
        raise UserError(text, where=str(output_dir), fix="Choose another output_dir.")
    if first_file == SETTINGS and (overwrite or not (output_dir / RECORD).exists()):
        refuse_files_in_the_way(output_dir, checkpoints=overwrite)


def is_run(folder: Path) -> bool:
    """Whether a run began in a folder: its settings file holds every setting, as nobody writes one by hand."""
    try:
        return {*read_object(folder / SETTINGS, INDEX_BYTES)} >= _MARKS
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False


def refuse_files_in_the_way(output_dir: Path, *, checkpoints: bool = False) -> None:
    """Make sure before the work begins that a result replaces nothing but an earlier one, as that was written.

    With `checkpoints`, those are removed too.

    Raises:
        UserError: names what is in the way.
    """
    _, others = ours_and_others(output_dir)
    taken = [name for name in others if _may_be_ours(name) and (checkpoints or not _CHECKPOINT.fullmatch(name))]
    in_the_way = [f"{name} ({others[name]})" for name in taken]
    if in_the_way:
        what = f"output_dir contains changed or unknown files where this run writes: {shown(in_the_way)}"
        raise UserError(what, where=str(output_dir), fix="Move them away, or choose another output_dir.")


def refuse_inputs(output_dir: Path, inputs: Mapping[str, Iterable[Path]]) -> None:
    """Make sure that a run neither removes nor replaces what it reads, by whatever name or link.

    Args:
        inputs: files and folders that are read, by what they are in words.

    Raises:
        UserError: it would; names it.
    """
    written = [output_dir / name for name in _WORKING if "*" not in name]
    here = Path(os.path.realpath(output_dir))
    for what, paths in inputs.items():
        for path in paths:
            real = Path(os.path.realpath(path))
            inside = real.relative_to(here).parts[:1] if here in (real, *real.parents) else None
            if inside == () or (inside and _may_be_ours(inside[0])):
                raise UserError(f"output_dir would replace {what}", where=str(path), fix="Choose another output_dir.")
            for file in written:
                refuse_same_file(file, "output_dir", {what: [path]})


def _may_be_ours(name: str) -> bool:
    patterns = (*_WORKING, *_ADAPTER, *_MODEL, *_TOKENIZER)
    return _is_named(name, patterns) or bool(_CHECKPOINT.fullmatch(name))


def ours_and_others(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """What a run wrote to its folder, and the names of everything else, each with the reason why it is not the run's.

    A result is known by its list. One of version 0.1.0, which wrote none, is known by its record: it consists of the
    files that a run of its method writes.
    """
    if not folder.is_dir():
        return [], {}
    in_result = _InResult(folder)
    reasons = {path: _why_not_ours(path, in_result) for path in sorted(folder.iterdir()) if path.name != LOCK}
    ours = [path for path, reason in reasons.items() if reason is None]
    return ours, {path.name: reason for path, reason in reasons.items() if reason is not None}


def _why_not_ours(path: Path, in_result: _InResult) -> str | None:
    if _HALF_DONE.fullmatch(path.name) or _is_named(path.name, _WORKING):
        return None
    if _CHECKPOINT.fullmatch(path.name):
        return why_no_checkpoint(path)
    return in_result.why_not(path)


def why_no_checkpoint(folder: Path) -> str | None:
    """Why a folder is not a checkpoint, broken or whole, with nothing else in it; None if it is one."""
    try:
        names = {*dict(read_object(folder / MANIFEST, INDEX_BYTES)["files"])}
    except (OSError, UserError, KeyError, TypeError, ValueError):
        names = set[str]()
    if "state.json" not in names or folder.is_symlink():
        return "without the manifest of a checkpoint"
    theirs = sorted({path.name for path in folder.iterdir()} - names - {MANIFEST})
    return f"holds {shown(theirs)}" if theirs else None


class _InResult:
    """Tells whether a file in a run's folder is of its result."""

    def __init__(self, folder: Path) -> None:
        self.listed = Listed(folder)
        self._known: tuple[str, ...] = ()
        if self.listed.maker is None and is_run(folder):
            with suppress(UserError):  # a broken record names no files
                record = read_record(folder)
                self._known = (*(_MODEL if record.method == "full" else _ADAPTER), *_TOKENIZER) if record else ()

    def why_not(self, path: Path) -> str | None:
        """Why a file is not of the result as it was written; None if it is."""
        if self.listed.maker is None:
            named = _is_named(path.name, self._known) and path.is_file() and not path.is_symlink()
            return None if named else "not of a result"
        return self.listed.why_not(path.name) if self.listed.maker == _MAKER else "not of a run's result"


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def put_result(staged: Path, output_dir: Path) -> None:
    """Move the files of a result into a run's folder, after their list; what came into their way meanwhile is kept."""
    in_result = _InResult(output_dir)
    list_files(staged, output_dir, _MAKER, earlier=in_result.listed)
    for path in sorted(staged.iterdir()):
        place = output_dir / path.name
        usual_permissions(path)
        if os.path.lexists(place) and in_result.why_not(place):
            aside = place.with_name(f"{place.name}.replaced-{secrets.token_hex(8)}")
            os.rename(place, aside)
            say(f"Warning: {place} appeared during the run; it was renamed to {aside.name}.")
        os.replace(path, place)


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
        what = f"another run is writing to this output_dir ({_holder(path)})"
        raise UserError(what, where=str(output_dir), fix="Wait until it ends, or choose another output_dir.") from None
    except OSError as error:  # permissions do not tell all: a read-only disk, an odd file system
        what = f"output_dir cannot be written ({error.strerror})"
        raise UserError(what, where=str(output_dir), fix="Choose another output_dir.") from None
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


def prepare_output_folder(output_dir: Path, *, start_over: bool) -> None:
    """Remove what a killed run left half done; `start_over` removes an earlier run's files too, and no others."""
    half_done = [path for path in output_dir.iterdir() if _HALF_DONE.fullmatch(path.name)]
    for path in ours_and_others(output_dir)[0] if start_over else half_done:
        if path.name == _TRACKERS:  # of which only what TensorBoard wrote
            for events in [events for events in path.rglob("events.out.tfevents.*") if not events.is_dir()]:
                events.unlink()
            remove_empty_folders(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
