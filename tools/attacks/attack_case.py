"""What an attack is: a folder that is spoiled, the commands that meet it, and what has to come of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Expected = Literal["refused", "fine", "either"]
Argv = tuple[str, ...]

SECRET = "zq7-planted-zq7-4f1c9b"  # in HF_TOKEN of every command; must be in nothing that is shown or written
OTHER_SECRETS = "zq8-"  # begins the values of a case's own variables that must not be written
TINY = ("--max_new_tokens", "2", "--temperature", "0")
INFER: Argv = ("infer", "--base_model", "model", "--prompt", "hi", *TINY)
INFER_ADAPTER: Argv = (*INFER, "--lora_model", "adapter")
INFER_FILE: Argv = (
    "infer", "--base_model", "model", "--prompt_file", "rows.jsonl", "--output_file", "out.jsonl", *TINY,
)  # fmt: skip
CHAT: Argv = ("chat", "--base_model", "model", *TINY)
TRAIN: Argv = (
    "train", "--model_name_or_path", "model", "--data_path", "rows.jsonl", "--output_dir", "out", "--use_lora", "true",
    "--lora_r", "4", "--max_steps", "1", "--report_to", "none", "--bf16", "false", "--per_device_train_batch_size", "2",
)  # fmt: skip
MERGE: Argv = ("merge", "--base_model", "model", "--lora_model", "adapter", "--output_dir", "out")
EXPORT: Argv = ("export", "--base_model", "model", "--output_dir", "out", "--quantize", "q8_0")
EVALUATE: Argv = (
    "evaluate", "--base_model", "model", "--only_after", "true", "--data", "rows.jsonl", "--limit", "2", "--output_dir",
    "out", *TINY[:2],
)  # fmt: skip
PLAN: Argv = ("plan", "--model_name_or_path", "model", "--data_path", "rows.jsonl", "--use_lora", "true")
CHECK: Argv = ("check", "--data", "rows.jsonl", "--strict", "true")
CHECK_TOKENS: Argv = (*CHECK, "--model_name_or_path", "model")
REPORT: Argv = ("report", "--output_dir", "run")
PUSH: Argv = ("push", "--folder", "adapter", "--repo", "me/tiny")


class Place:
    """The folder of a case. Commands run in `work`; nothing in `outside` and `home` may change.

    Attributes:
        draw: random numbers of the case's own, the same in every run.
    """

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        self.work, self.outside, self.home = folder / "work", folder / "outside", folder / "home"

    def __truediv__(self, name: str) -> Path:
        """A path in the working folder."""
        return self.work / name

    @property
    def pwned(self) -> Path:
        """A file that a stranger's code would make if it ran."""
        return self.outside / "pwned"

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file in the working folder, with its parents."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def read_json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads((self.work / name).read_text(encoding="utf-8"))

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file; NaN and infinities as Python writes them."""
        return self.write(name, json.dumps(content))

    def edit_json(self, name: str, changes: Mapping[str, Any]) -> None:
        """Set values in a JSON file; a key `a.b` lies in the object `a`."""
        content = self.read_json(name) if (self.work / name).exists() else {}
        for key, value in changes.items():
            inner, *path = content, *key.split(".")
            for part in path[:-1]:
                if not isinstance(inner.get(part), dict):
                    inner[part] = {}
                inner = inner[part]
            inner[path[-1]] = value
        self.write_json(name, content)

    def write_rows(self, name: str, rows: Sequence[Any]) -> Path:
        """Write rows as JSON lines."""
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))


Spoil = Callable[[Place], None]


@dataclass(frozen=True)
class Ended:
    """A command that ended.

    Attributes:
        code: its exit code; negative for a signal.
        why_killed: "time" where it was ended by the suite.
        cpu_s: seconds of computing, its children's too.
        ids: token ids that went into the model's embedding, call by call, where they were watched.
        reached: what it asked of the network or of a loader of native code, a line each.
    """

    argv: Argv
    code: int
    out: bytes
    err: bytes
    cpu_s: float = 0.0
    why_killed: str | None = None
    ids: tuple[tuple[int, ...], ...] = ()
    reached: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """All that it wrote to the terminal or the two streams."""
        return (self.out + self.err).decode("utf-8", "backslashreplace")


Check = Callable[[Place, Sequence[Ended]], "str | None"]


@dataclass(frozen=True)
class Case:
    """An attack.

    Attributes:
        group: the class under which it is counted.
        name: what is spoiled, unique in the class.
        spoil: does it.
        commands: run one after another, each in a process of its own.
        expect: refused: exit 2 and a message; fine: exit 0; either of them where both are right.
        needs: folders and files of the fixtures to be copied into the working folder.
        names: a refusal must hold one of these words, which say where the fault is.
        writes: what the commands may write in the working folder.
        tty: whether they run at a terminal, whose escape sequences are then looked for.
        watch: "ids" records token ids that enter the model, "kernels" pretends that the loader of kernels is there.
        stdin: what is typed.
        env: variables, `{outside}` and `{work}` filled in; None removes one.
        check: looks at the result where exit codes do not tell.
        between: changes something after the first command.
        process: what happens to the first command's process: see attack_server.Harm.
        codes: exit codes that the first command may end with, where they are not those of `expect`.
    """

    group: str
    name: str
    spoil: Spoil
    commands: tuple[Argv, ...]
    expect: Expected = "either"
    needs: tuple[str, ...] = ("model", "rows.jsonl")
    names: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("out", "out.jsonl")
    tty: bool = False
    watch: str | None = None
    stdin: bytes = b""
    env: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    check: Check | None = None
    between: Spoil | None = None
    process: Mapping[str, Any] = field(default_factory=dict[str, Any])
    codes: tuple[int, ...] = ()
    seed: int = 0
    number: int = 0

    @property
    def identity(self) -> str:
        """By which `--case` finds it."""
        return f"{self.group}-{self.number:03d}-{self.name}"


def numbered(cases: Iterator[Case], seed: int) -> list[Case]:
    """The cases of a class with their numbers, and seeds that follow from class, number and the suite's seed.

    Raises:
        ValueError: two have one name.
    """
    found = [
        replace(case, number=number, seed=random.Random(f"{seed} {case.group} {number}").getrandbits(32))
        for number, case in enumerate(cases, 1)
    ]
    if twice := {case.name for case in found if sum(other.name == case.name for other in found) > 1}:
        raise ValueError(f"names that come twice: {sorted(twice)}")
    return found


def with_word(argv: Argv, word: str, other: str) -> Argv:
    """A command with another word in the place of one."""
    return tuple(other if one == word else one for one in argv)


def nothing(place: Place) -> None:
    """Leave all as it is: a harmless case."""


def with_lines(place: Place, name: str, *lines: str) -> None:
    """Append lines to a text file."""
    path = place / name
    path.write_text(path.read_text(encoding="utf-8") + "".join(f"{line}\n" for line in lines), encoding="utf-8")
