"""Attacks by caches, checkpoints and comparisons."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attack_case import INFER, TRAIN, Argv, Case, Ended, Expected, Place, Spoil, nothing, with_word
from attack_folders import RESUME
from attack_values import BROKEN_JSON, join_safetensors, shown, split_safetensors

CACHES, COMPARE = "caches and checkpoints", "compare"
IN_CACHE = {"QINGTUNE_CACHE": "{work}/cache"}
INFER_GGUF = with_word(INFER, "model", "model.gguf")
QLORA: Argv = (*TRAIN, "--use_qlora", "true", "--quantization_bit", "4", "--logging_steps", "1")
STOPPED = ("model", "stopped", "rows.jsonl")


def cache_cases() -> Iterator[Case]:
    """Compiled code that others wrote, converted models that are broken, checkpoints that lie."""
    for name, spoil in {
        "foreign": _native(1234, 0o755),
        "foreign-open": _native(1234, 0o777),
        "open": _native(None, 0o777),
        "link": _native_link,
        "folder-open": _native(None, 0o755, folder=0o777),
    }.items():
        env = {**IN_CACHE, "PWNED": "{outside}/pwned"}
        yield Case(CACHES, f"native-{name}", spoil, (INFER,), "fine", ("model", "cache"), writes=("cache",), env=env)
    for name, change in _CONVERTED.items():
        yield Case(CACHES, f"converted-{name}", _in_converted(change), (INFER_GGUF,), "either", ("model.gguf", "cache"),
                   writes=("cache",), env=IN_CACHE)  # fmt: skip
    yield Case(CACHES, "control-converted", nothing, (INFER_GGUF,), "fine", ("model.gguf", "cache"), env=IN_CACHE,
               writes=("cache",))  # fmt: skip
    other = with_word(QLORA, "out", "out2")
    yield Case(CACHES, "weights-of-the-same-size-and-time", nothing, (QLORA, other), "fine", between=_other_weights,
               check=_losses_differ, writes=("out", "out2", "model"))  # fmt: skip
    yield from _checkpoint_cases()


def _native(owner: int | None, mode: int, folder: int = 0o700) -> Spoil:
    """The compiled library replaced by another's, which makes a file when it is loaded."""

    def spoil(place: Place) -> None:
        (place / "cache/native").mkdir(parents=True, exist_ok=True)  # not there where the CPU lacks the units
        for path in (place / "cache/native").glob("*.so"):
            _compile(path)
            path.chmod(mode)
            if owner is not None:
                os.chown(path, owner, owner)
        (place / "cache/native").chmod(folder)

    return spoil


_TRAP = (
    "#include <stdio.h>\n#include <stdlib.h>\n"
    '__attribute__((constructor)) static void trap(void) { FILE *f = fopen(getenv("PWNED"), "w"); if (f) fclose(f); }\n'
)


def _compile(path: Path) -> None:
    source = path.with_suffix(".trap.c")
    source.write_text(_TRAP)
    path.unlink(missing_ok=True)
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    source.unlink()


def _native_link(place: Place) -> None:
    trap = place.outside / "trap.so"
    _compile(trap)
    os.chown(trap, 1234, 1234)
    for path in (place / "cache/native").glob("*.so"):
        path.unlink()
        path.symlink_to(trap)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


_CONVERTED: dict[str, Callable[[Path], None]] = {
    "weights-cut": lambda folder: _cut(folder / "model.safetensors"),
    "weights-empty": lambda folder: _write(folder / "model.safetensors", b""),
    "weights-gone": lambda folder: (folder / "model.safetensors").unlink(),
    "config-cut": lambda folder: _cut(folder / "config.json"),
    "config-gone": lambda folder: (folder / "config.json").unlink(),
    "config-list": lambda folder: _write(folder / "config.json", b"[]"),
    "tokenizer-cut": lambda folder: _cut(folder / "tokenizer.json"),
    "tokenizer-gone": lambda folder: (folder / "tokenizer.json").unlink(),
    "all-gone": _empty,
    "pickle": lambda folder: _write(folder / "pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'id'\ntR."),
}  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _in_converted(change: Callable[[Path], None]) -> Spoil:
    def spoil(place: Place) -> None:
        for config in [*(place / "cache").rglob("config.json")]:
            change(config.parent)

    return spoil


def _other_weights(place: Place) -> None:
    """Other weights of the same size, with the same time."""
    path = place / "model/model.safetensors"
    status = path.stat()
    header, data = split_safetensors(path.read_bytes())
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    path.write_bytes(join_safetensors(header, struct.pack(f"<{len(numbers)}f", *(9 * number for number in numbers))))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _losses_differ(place: Place, ended: Sequence[Ended]) -> str | None:
    losses = [json.loads((place / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("out", "out2")]
    return "the old weights were trained on" if losses[0].get("loss") == losses[1].get("loss") else None


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint_cases() -> Iterator[Case]:
    ways: list[tuple[str, str, bytes | Callable[[bytes], bytes]]] = []
    names = ("state.json", "manifest.json", "weights.safetensors", "optimizer.safetensors")
    for number, (way, how) in enumerate(BROKEN_JSON.items()):
        if way in ("gigabyte-of-spaces", "utf16", "html", "lfs-pointer"):
            continue
        ways.append((f"stopped/checkpoint-3/{names[number % 2]}", way, how))
        if number % 3 == 0:
            ways.append(("stopped/latest_checkpoint.json", way, how))
    for name in names[2:]:
        ways += [
            (f"stopped/checkpoint-3/{name}", "cut", lambda content: content[:-9]),
            (f"stopped/checkpoint-3/{name}", "nan", _all_nan),
            (f"stopped/checkpoint-3/{name}", "length", lambda content: struct.pack("<Q", 2**62) + content[8:]),
        ]
    for name, way, how in ways:
        for honest in (False, True) if "checkpoint-3/" in name and "manifest" not in name else (False,):
            label = f"{name.split('/', 1)[1].replace('/', '-')}-{way}{'-manifest-too' * honest}"
            yield _checkpoint(label, _file(name, how, manifest=honest))
    for key, value in _STATE:
        yield _checkpoint(f"state-{key}={shown(value)}", _state(key, value))
    for value in ("../../outside", "/etc", "checkpoint-99", "", "checkpoint-3/../../..", 5, None):
        yield _checkpoint(f"pointer-{shown(value)}", _pointer(value))
    yield Case(CACHES, "control-resumes", nothing, (RESUME,), "fine", STOPPED, writes=("stopped",))


_STATE: tuple[tuple[str, Any], ...] = (
    ("step", -1),
    ("step", 10**12),
    ("step", "x"),
    ("step", 3.5),
    ("seed", "x"),
    ("settings", {}),
    ("rng", "x"),
    ("progress", None),
    ("epoch", -5),
)


def _all_nan(content: bytes) -> bytes:
    header, data = split_safetensors(content)
    return join_safetensors(header, struct.pack("<f", float("nan")) * (len(data) // 4) + data[len(data) // 4 * 4 :])


def _checkpoint(name: str, spoil: Spoil) -> Case:
    return Case(CACHES, name, spoil, (RESUME,), "either", STOPPED, writes=("stopped",))


def _file(name: str, how: bytes | Callable[[bytes], bytes], *, manifest: bool) -> Spoil:
    def spoil(place: Place) -> None:
        path = place / name
        place.write(name, how(path.read_bytes()) if callable(how) else how)
        if manifest:
            _promise(place, path)

    return spoil


def _promise(place: Place, path: Path) -> None:
    """Have the manifest name the file as it is now."""
    import hashlib

    name = "stopped/checkpoint-3/manifest.json"
    content = place.read_json(name)
    raw = path.read_bytes()
    content["files"][path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    place.write_json(name, content)


def _state(key: str, value: Any) -> Spoil:
    def spoil(place: Place) -> None:
        name = "stopped/checkpoint-3/state.json"
        content = place.read_json(name)
        inner = content["progress"] if key in content.get("progress", {}) else content
        inner[key] = value
        _promise(place, place.write_json(name, content))

    return spoil


def _pointer(value: Any) -> Spoil:
    return lambda place: place.write_json("stopped/latest_checkpoint.json", {"folder": value}) and None


# --- Compare ---------------------------------------------------------------------------------------------------------

_COMPARE: Argv = ("compare", *TRAIN[1:], "--val_size", "2", "--eval_strategy", "steps", "--eval_steps", "1")


def compare_cases() -> Iterator[Case]:
    """Comparisons of nothing, of the impossible, and of runs that learnt too little."""
    refused: dict[str, tuple[str, ...]] = {
        "methods-evil": ("--methods", "evil"),
        "seeds-0": ("--seeds", "0"),
        "seeds-x": ("--seeds", "x"),
        "grid-unknown": ("--grid", "evil=1,2"),
        "grid-broken": ("--grid", "lora_r"),
        "grid-values": ("--grid", "lora_r=0,-1"),
        "space-reversed": ("--space", "learning_rate=1..0.1"),
        "space-broken": ("--space", "lora_r=a..b"),
        "grid-and-space": ("--grid", "lora_r=2,4", "--space", "lora_r=2..4"),
        "per-method-evil": ("--per_method", "evil.lora_r=5"),
        "keep-evil": ("--keep_models", "evil"),
        "trials-0": ("--trials", "0"),
        "grid-escapes": ("--grid", "\x1b]0;evil\x07=1"),
    }
    for name, flags in refused.items():
        yield Case(COMPARE, name, nothing, ((*_COMPARE, *flags),), "refused", tty="escapes" in name)
    expect: Expected = "fine"
    yield Case(COMPARE, "learnt-nothing", nothing, ((*_COMPARE, "--learning_rate", "1e-12", "--methods", "lora,full"),),
               expect, check=_no_wild_share)  # fmt: skip
    yield Case(COMPARE, "control-inline-plots", nothing, ((*_COMPARE, "--grid", "lora_r=2,4"),), expect,
               env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, check=_has_table)  # fmt: skip


def _no_wild_share(place: Place, ended: Sequence[Ended]) -> str | None:
    wild = re.search(r"-\d{3,}(\.\d+)? ?%", ended[0].shown)
    return f"a claim that means nothing: {wild[0]}" if wild else None


def _has_table(place: Place, ended: Sequence[Ended]) -> str | None:
    return None if "lora_r" in ended[0].shown else "no table is shown"
