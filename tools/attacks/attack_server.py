"""Runs commands of the attacked package in forked children: heavy imports are paid once, and each command dies alone.

Started as a process: `python attack_server.py PACKAGE`. Reads a JSON object a line and answers each with one. The
process itself makes no tensor: a fork of a process with threads could hang.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

MORE_MEMORY = 3 << 30  # bytes of address space that a command may take besides what the imports took
LARGEST_FILE = 1 << 30
MOST_SHOWN = 8 << 20  # bytes of a terminal's output that are kept
PROMPT = b"\x1b[?2004h"  # bracketed paste is switched on: the command waits for a line


def serve(package: Path) -> None:
    """Answer until the input ends."""
    sys.path.insert(0, str(package))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer = {"imported": preload(request["modules"])} if "modules" in request else run(request)
        print(json.dumps(answer), file=answers, flush=True)


def preload(names: list[str]) -> int:
    """Import modules that commands were seen to import; returns how many could be."""
    count = 0
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
            count += 1
    return count


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run a command in a child, in a session of its own, and end what is left of it."""
    pid, terminal = pty.fork() if request.get("tty") else (os.fork(), -1)
    if pid == 0:
        _child(request)
    handle = os.pidfd_open(pid)
    began = time.monotonic()
    if "signal" in request.get("harm", {}):
        _send(pid, handle, request["harm"], Path(request["cwd"]), began + request["seconds"])
    typed = Path(request["stdin"]).read_bytes().splitlines() if terminal >= 0 else []
    shown = _wait(handle, terminal, began + request["seconds"], typed)
    killed = not select.select([handle], [], [], 0)[0]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(handle)
    if terminal >= 0:
        shown += _rest(terminal)
        os.close(terminal)
        Path(request["out"]).write_bytes(shown)
        Path(request["err"]).write_bytes(b"")
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "killed": "time" if killed else None, "cpu": usage.ru_utime + usage.ru_stime}


def _send(pid: int, handle: int, harm: dict[str, Any], cwd: Path, until: float) -> None:
    """Send a child its signal: some seconds after a file of this pattern is there, or after its start."""
    pattern = harm.get("when")
    while pattern and not any(cwd.glob(pattern)) and time.monotonic() < until:
        if select.select([handle], [], [], 0.005)[0]:
            return  # it ended before
    if not select.select([handle], [], [], harm.get("after", 0))[0]:
        os.kill(pid, signal.Signals[harm["signal"]])
        if harm.get("twice") and not select.select([handle], [], [], 0.2)[0]:
            os.kill(pid, signal.Signals[harm["signal"]])


def _harm(harm: dict[str, Any]) -> None:
    """Harm this process: descriptors closed, full or without a reader; limits; a user without a name."""
    for number in harm.get("full", ()):
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, number)
    for number in harm.get("broken", ()):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)
    for number in harm.get("closed", ()):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    for name, most in harm.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if harm.get("nameless"):
        import pwd

        def unknown(uid: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        pwd.getpwuid = unknown  # pyright: ignore[reportAttributeAccessIssue]


def _wait(handle: int, terminal: int, until: float, typed: list[bytes]) -> bytes:
    """Wait for a child's end or the time's, reading what it shows at its terminal and typing a line at each prompt."""
    shown = b""
    watched = [handle] if terminal < 0 else [handle, terminal]
    while (left := until - time.monotonic()) > 0:
        ready = select.select(watched, [], [], left)[0]
        if terminal in ready:
            piece = _piece(terminal)
            shown = (shown + piece)[:MOST_SHOWN]
            if PROMPT in piece and typed:
                os.write(terminal, typed.pop(0) + b"\r")
            if not piece:
                watched = [handle]
        elif handle in ready:
            break
    return shown


def _rest(terminal: int) -> bytes:
    shown = b""
    while select.select([terminal], [], [], 0)[0] and (piece := _piece(terminal)):
        shown += piece
    return shown[:MOST_SHOWN]


def _piece(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last holder of the other end is gone
        return b""


def _child(request: dict[str, Any]) -> None:
    """Be the command; never returns."""
    code = 1
    try:
        _settle(request)
        _harm(request.get("harm", {}))
        with _watched(request.get("watch"), Path(request["log"])):
            code = _command(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        if code == 0:  # as Python does at its end
            try:
                getattr(sys.stdout, "flush", int)()
            except OSError:
                code = 120
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        if "modules_to" in request:
            Path(request["modules_to"]).write_text(json.dumps(sorted(sys.modules)))
        os._exit(code & 0xFF)


def _settle(request: dict[str, Any]) -> None:
    """Give the child its streams, folder, environment and limits."""
    if not request.get("tty"):
        os.setsid()
        for name, number, how in (("stdin", 0, os.O_RDONLY), ("out", 1, os.O_WRONLY), ("err", 2, os.O_WRONLY)):
            handle = os.open(request[name], how | os.O_CREAT, 0o600)
            os.dup2(handle, number)
            os.close(handle)
    buffering = 1 if request.get("tty") else -1
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    for name, value in request["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + MORE_MEMORY),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _command(request: dict[str, Any]) -> int:
    if "call" in request:
        module, function = request["call"].split(":")
        getattr(importlib.import_module(module), function)(*request["argv"])
        return 0
    from qingtune.cli import main

    return main(request["argv"])


# --- What is watched ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watched(what: str | None, log: Path) -> Generator[None]:
    """Note in a log what is asked of the network, and what the case is about."""
    _no_network(log)
    if what == "kernels":
        _pretend_kernels(log)
    if what == "ids":
        with _recorded_ids(log):
            yield
    else:
        yield


def note(log: Path, kind: str, content: Any) -> None:
    """Append a line to the log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({kind: content}) + "\n")


def _no_network(log: Path) -> None:
    """Refuse connections and look-ups of names, and note them."""
    import socket

    def refuse(*arguments: Any, **_: Any) -> None:
        asked = [argument for argument in arguments if isinstance(argument, (str, tuple))]
        note(log, "reached", f"network: {asked}")
        raise OSError("the attack suite has no network")

    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        return refuse(address)

    socket.socket.connect = local_only
    socket.getaddrinfo = refuse  # pyright: ignore[reportAttributeAccessIssue]


def _pretend_kernels(log: Path) -> None:
    """Have Transformers believe that the loader of native code from a hub is installed; calls of it are noted."""
    import transformers.integrations.hub_kernels as hub
    from transformers.utils import import_utils

    def loader(name: str) -> Any:
        def load(*arguments: Any, **named: Any) -> None:
            note(log, "reached", f"loader of kernels: {name} {[str(argument)[:80] for argument in arguments]} {named}")
            raise ImportError("a kernel would have been loaded here")

        return load

    names = ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel", "load_and_register_kernel")
    replacements: dict[int, Any] = {
        id(getattr(hub, name)): loader(name) for name in names if callable(getattr(hub, name, None))
    }
    replacements[id(import_utils.is_kernels_available)] = lambda *_, **__: True
    for module in [*sys.modules.values()]:
        for name, value in [*getattr(module, "__dict__", {}).items()]:
            if id(value) in replacements:
                setattr(module, name, replacements[id(value)])


@contextlib.contextmanager
def _recorded_ids(log: Path) -> Generator[None]:
    """Note the ids by which rows are taken out of a matrix as long as the vocabulary and as wide as the model."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith(("aten.embedding.", "aten.index.", "aten.index_select.")):
                matrix, ids = args[0], args[-1] if "index_select" in name else args[1]
                ids = ids[0] if isinstance(ids, (list, tuple)) else ids
                if isinstance(ids, Tensor) and not ids.is_floating_point() and matrix.dim() == 2 and len(matrix) >= 320:
                    note(log, "ids", ids.flatten().tolist())
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
