"""Decides what is wrong with what came of an attack."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attack_case import OTHER_SECRETS, SECRET, Case, Ended, Place

DONE, REFUSED, INTERRUPTED = 0, 2, 130
MOST_LINES = 200
MOST_SHOWN = 100_000  # characters
MOST_CPU_S = 20.0
# What a terminal must not get from a stranger: titles and clipboards (OSC), clearing, hiding, resetting, C1 controls,
# bells, and marks that turn the direction of text.
_ESCAPES = {
    "OSC": b"\x1b]", "DCS": b"\x1bP", "clear": b"\x1b[2J", "clear all": b"\x1b[3J", "hidden text": b"\x1b[8m",
    "reset": b"\x1bc", "C1 OSC": "\x9d".encode(), "C1 CSI": "\x9b".encode(), "bell": b"\x07",
    "right-to-left": "\u202e".encode(), "isolate": "\u2066".encode(), "right-to-left isolate": "\u2067".encode(),
}  # fmt: skip
_CRASHES = (
    "Traceback (most recent call last)",
    "panicked at",
    "Segmentation fault",
    "core dumped",
    "Fatal Python error",
)


@dataclass(frozen=True)
class Verdict:
    """What is wrong, in words; nothing where all is well."""

    wrong: tuple[str, ...]

    @property
    def bad(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.wrong)


Snapshot = dict[str, str]


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder by its name: kind, rights, and content or target."""
    found: Snapshot = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            found[str(path.relative_to(folder))] = _state(path)
    return found


def _state(path: Path) -> str:
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(kind):
        return f"link to {os.readlink(path)}"
    if stat.S_ISREG(kind):
        if status.st_size > 64 << 20:
            return f"file of {status.st_size} bytes"
        try:
            return f"file {stat.S_IMODE(status.st_mode):o} {hashlib.sha1(path.read_bytes()).hexdigest()}"
        except OSError:
            return f"unreadable file of {status.st_size} bytes"
    return f"{kind:o} {stat.S_IMODE(status.st_mode):o}" if stat.S_ISDIR(kind) else f"{kind:o}"


def judge(case: Case, place: Place, before: Snapshot, ended: Sequence[Ended]) -> Verdict:
    """All that is wrong with a case."""
    wrong: list[str] = []
    for number, one in enumerate(ended):
        codes = case.codes if number == 0 else ()
        found = [*_died(one, codes), *([] if codes else _answered(case, one)), *_showed(case, one)]
        wrong += [f"{one.argv[0]}: {what}" for what in found]
    wrong += _touched(case, place, before)
    wrong += _secrets(case, place, ended)
    if case.check is not None and not wrong and (what := case.check(place, ended)):
        wrong.append(what)
    return Verdict(tuple(wrong))


def _died(one: Ended, codes: Sequence[int]) -> list[str]:
    """A crash, a hang, or a trap that was sprung."""
    wrong = [f"reached {_short(what)}" for what in one.reached[:1]]
    if one.why_killed:
        return [*wrong, f"hung (ended after {one.cpu_s:.0f} s of computing)"]
    if codes and one.code not in codes:
        wrong.append(f"exit code {one.code}, not {' or '.join(map(str, codes))}")
    elif codes:
        pass
    elif one.code < 0 or one.code > 130:
        wrong.append(f"ended by signal {-one.code if one.code < 0 else one.code - 128}")
    elif one.code not in (DONE, REFUSED, INTERRUPTED):
        wrong.append(f"exit code {one.code}")
    if crash := next((crash for crash in _CRASHES if crash in one.shown), None):
        last = [line for line in one.shown.strip().splitlines() if line.strip()][-1:]
        wrong.append(f"{'traceback' if crash.startswith('Traceback') else crash}: {_short(''.join(last))}")
    if one.cpu_s > MOST_CPU_S:
        wrong.append(f"took {one.cpu_s:.0f} s of computing")
    return wrong


def _answered(case: Case, one: Ended) -> list[str]:
    """An exit code or a message that is not what it has to be."""
    if one.why_killed or one.code not in (DONE, REFUSED):
        return []
    if case.expect == "refused" and one.code == DONE:
        return ["accepted what has to be refused"]
    if case.expect == "fine" and one.code == REFUSED:
        return [f"refused what is legitimate: {_short(one.shown[max(0, one.shown.find('error: ')) :])}"]
    if one.code != REFUSED:
        return []
    message = one.shown[one.shown.find("error: ") :] if "error: " in one.shown else one.shown
    if not message.strip():
        return ["refused without a word"]
    if case.names and not any(word in message for word in case.names):
        return [f"the message does not say where ({' or '.join(case.names)}): {_short(message)}"]
    return []


def _showed(case: Case, one: Ended) -> list[str]:
    """Too much, or what steers a terminal."""
    wrong: list[str] = []
    lines = one.shown.count("\n")
    if lines > MOST_LINES or len(one.shown) > MOST_SHOWN:
        wrong.append(f"output of {lines:,} lines, {len(one.shown):,} characters")
    if case.tty:
        wrong += [f"the terminal gets an escape: {name}" for name, found in _ESCAPES.items() if found in one.out]
    return wrong


def _touched(case: Case, place: Place, before: Mapping[str, str]) -> list[str]:
    """What was made, changed or removed where nothing may be."""
    now = snapshot(place.folder)
    allowed = tuple(f"work/{name}" for name in case.writes)
    changed = [
        name
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
        and not any(name == other or name.startswith(f"{other}/") for other in allowed)
        and not name.startswith(("home/.cache/", "home/.config/", "home/.qingtune"))
        and name not in ("home/.cache", "home/.config")
    ]
    wrong = ["a stranger's code ran"] if place.pwned.exists() else []
    for name in changed[:3]:
        what = "made" if name not in before else "removed" if name not in now else "changed"
        wrong.append(f"{what} {_short(name)}" + (f" ({len(changed)} in all)" if len(changed) > 3 else ""))
    return wrong


def _secrets(case: Case, place: Place, ended: Sequence[Ended]) -> list[str]:
    """The planted secret, shown or written."""
    planted = (SECRET, *(value for value in case.env.values() if value and value.startswith(OTHER_SECRETS)))
    wrong = ["a secret is shown" for one in ended if SECRET in one.shown]
    for name in case.writes:
        root = place / name
        for path in [root, *(root.rglob("*") if root.is_dir() and not root.is_symlink() else ())]:
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 16 << 20:
                content = path.read_bytes()
                wrong += [f"a secret is in {path.name}" for secret in planted if secret.encode() in content]
    return wrong[:3]


def _short(text: str, most: int = 160) -> str:
    plain = ascii(" ".join(text.split()))[1:-1]
    return plain if len(plain) <= most else f"{plain[:most]}..."
