"""Attacks on processes: signals, closed and full descriptors, limits, killed writers, a user without a name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from attack_case import (
    CHECK,
    EVALUATE,
    EXPORT,
    INFER,
    INFER_FILE,
    MERGE,
    PLAN,
    TRAIN,
    Argv,
    Case,
    Ended,
    Expected,
    Place,
    nothing,
)

GROUP = "processes"
ALL = ("model", "adapter", "rows.jsonl")
LONG: Argv = (*TRAIN, "--max_steps", "60", "--logging_steps", "1", "--save_steps", "5")
INTERRUPTED = (0, 130)
LOG, SAVED = "out/metrics.jsonl", "out/checkpoint-5"  # the second is there when training is under way


def process_cases() -> Iterator[Case]:
    """Each harms the first process; where a second follows, it must come to the result."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        for after in (0.0, 0.3):
            harm = {"signal": name, "when": SAVED, "after": after}
            yield _case(f"train-{name}-{after}", (LONG, LONG), harm, codes=INTERRUPTED, check=_saved)
    for name in ("SIGUSR1", "SIGPIPE"):
        harm = {"signal": name, "when": SAVED}
        yield _case(f"train-{name}", (LONG, LONG), harm, codes=INTERRUPTED, check=_saved)
    for number in range(5):
        harm = {"signal": "SIGKILL", "when": SAVED, "after": 0.07 * number}
        yield _case(f"train-SIGKILL-{number}", (LONG, LONG), harm, codes=(0, -9), check=_saved)
    for argv in (MERGE, EXPORT, EVALUATE, INFER_FILE):
        for name, codes in (("SIGKILL", (0, -9)), ("SIGTERM", (0, 130, 143, -15)), ("SIGHUP", (0, 129, 130, -1))):
            pattern = ".*" if argv in (MERGE, EXPORT) else None
            harm = {"signal": name, "when": pattern, "after": 0.02 if pattern else 0.1}
            yield _case(f"{argv[0]}-{name}", (argv, argv), harm, expect="either", codes=codes, check=_came_to_its_end)
    for where in ([1], [2], [1, 2]):
        label = "".join(map(str, where))
        yield _case(f"train-no-reader-{label}", (TRAIN,), {"broken": where}, codes=(0,), check=_trained)
        yield _case(f"train-full-{label}", (TRAIN,), {"full": where}, codes=(0,), check=_trained)
    for argv in (INFER, PLAN, CHECK):
        yield _case(f"{argv[0]}-no-reader", (argv,), {"broken": [1]}, codes=(0, 1, 2, 120, 141))
        yield _case(f"{argv[0]}-full", (argv,), {"full": [1]}, codes=(1, 2))
    for closed in ([0], [1], [2], [0, 1, 2]):
        argv = (TRAIN, INFER, MERGE)[len(closed) % 3 if closed != [2] else 0]
        yield _case(
            f"{argv[0]}-closed-{''.join(map(str, closed))}",
            (argv,),
            {"closed": closed},
            codes=(0, 2) if argv is INFER else (0,),
        )
    for name, limits in {
        "file-size": {"FSIZE": 20_000},
        "open-files": {"NOFILE": 24},
        "processes": {"NPROC": 1},
    }.items():
        for argv in (TRAIN, EXPORT):
            yield _case(f"{argv[0]}-limit-{name}", (argv,), {"limits": limits}, codes=(0, 2))
    for argv in (INFER, TRAIN):
        yield Case(
            GROUP, f"{argv[0]}-unknown-user", nothing, (argv,), "fine", ALL, process={"nameless": True},
            env={"HOME": None, "USER": None, "LOGNAME": None},
        )  # fmt: skip
    yield _case("control-train", (LONG,), {}, codes=(0,), check=_trained)


def _case(name: str, commands: tuple[Argv, ...], harm: dict[str, Any], expect: Expected = "fine", **more: Any) -> Case:
    return Case(GROUP, name, nothing, commands, expect, ALL, process=harm, **more)


def _trained(place: Place, ended: Sequence[Ended]) -> str | None:
    return None if (place / "out/adapter_model.safetensors").exists() else "no result was saved"


def _saved(place: Place, ended: Sequence[Ended]) -> str | None:
    """The second start finished, and resumed the first if that one could save."""
    steps = [json.loads(line).get("step") for line in (place / LOG).read_text().splitlines()]
    steps = [step for step in steps if step is not None]
    if steps != sorted(set(steps)):
        return "the log has steps twice"
    if ended[0].code == 130 and not any(word in ended[1].shown for word in ("Resuming", "already")):
        return "nothing was saved at the signal"
    return _trained(place, ended)


def _came_to_its_end(place: Place, ended: Sequence[Ended]) -> str | None:
    """The first start or, where that was ended, the second; nothing is left half done."""
    if ended[0].code and ended[1].code:
        return f"the second start was refused: {ended[1].shown[-300:]}"
    left = [path.name for path in place.work.iterdir() if path.name.startswith(".")]
    return f"left half done: {', '.join(left)}" if left else None
