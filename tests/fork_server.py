"""Python processes forked from one that has loaded the libraries: they start in milliseconds instead of seconds.

For tests of what a command does in a process. Tests of its start (what is loaded, what the environment says on import,
the installation) use `subprocess`. Run as a script, this file is the server: a single thread that has imported torch,
without a GPU, and has run no operation with it. It ends when the tests do, however they end, and ends what it forked.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# PYTHONPATH of processes that tests start: this checkout before what the caller has.
MODULES = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
MOST = 1 << 17  # bytes of a request
FORKS = sys.platform == "linux"


# --- The server ------------------------------------------------------------------------------------------------------


def load_libraries() -> None:
    """Import what commands import, without starting a thread: a fork copies locks, and not the threads to open them."""
    from qingtune.output.quiet import quieten

    quieten()
    import qingtune.commands.infer
    import qingtune.commands.train  # noqa: F401
    from qingtune.kernels.linear import import_bitsandbytes

    import_bitsandbytes()
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads run after the imports"


def serve(requests: socket.socket) -> None:
    """Answer until the other end is closed."""
    requests.sendall(b"ready")
    while True:
        text, handles, _, _ = socket.recv_fds(requests, MOST, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not text:
            os.killpg(0, signal.SIGKILL)
        if not os.fork():
            requests.close()
            look_after(json.loads(text), handles)
        for handle in handles:
            os.close(handle)


def look_after(request: dict[str, Any], handles: Sequence[int]) -> NoReturn:
    """Fork the process; reply with its number, and with its exit status once it has ended."""
    *streams, reply = handles
    if not (child := os.fork()):
        os.close(reply)
        become(request, streams)
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(BrokenPipeError):
        os.write(reply, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        os.write(reply, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Do in this process what Python would do in a new one, from its arguments to its exit status."""
    code: Any = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        if request["session"]:
            take_terminal()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        run_python(request["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        if not isinstance(code, int):
            print(code, file=sys.stderr)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def take_terminal() -> None:
    """Begin a session with the terminal that is standard input, so that Ctrl-C reaches this process."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def run_python(arguments: Sequence[str]) -> None:
    """Run `-c CODE ...`, `-m MODULE ...` or a script, with its arguments."""
    first, *rest = arguments
    sys.orig_argv = [sys.executable, *arguments]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


# --- Its users -------------------------------------------------------------------------------------------------------


class Forked:
    """A process that was forked, with what tests use of subprocess.Popen."""

    def __init__(self, replies: socket.socket, arguments: Sequence[str]) -> None:
        self._replies, self._arguments = replies.makefile("rb", buffering=0), arguments
        self.pid = int(self._replies.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """The exit status, when it has ended; a signal that ended it is a negative number."""
        if self.returncode is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._arguments, timeout)
            self.returncode = int(self._replies.readline())
            self._replies.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def start_python(
    *arguments: str | Path, streams: Sequence[int | IO[Any]], session: bool = False, **environment: str
) -> subprocess.Popen[bytes]:
    """Start Python with arguments in the repository.

    Args:
        streams: the three standard streams; subprocess.DEVNULL for nothing.
        session: whether it begins a session with the terminal that its standard input is.
        environment: changes of the environment.
    """
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": MODULES, **environment},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=take_terminal if session else None,
    )


class ForkServer:
    """The server, as the tests see it.

    Args:
        loaded: whether it loads the libraries.
    """

    def __init__(self, *, loaded: bool = True) -> None:
        if not FORKS:
            return
        self._nothing = os.open(os.devnull, os.O_RDWR)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *["load"] * loaded],
                env={**os.environ, "PYTHONPATH": MODULES, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self._requests.recv(MOST) == b"ready"

    def start(
        self, *arguments: str | Path, streams: Sequence[int | IO[Any]], session: bool = False, **environment: str
    ) -> Forked | subprocess.Popen[bytes]:
        """Fork what `start_python` would start; where that is not safe with these libraries, start it."""
        if not FORKS:
            return start_python(*arguments, streams=streams, session=session, **environment)
        words = [str(argument) for argument in arguments]
        env = {**os.environ, "PYTHONPATH": MODULES, **environment}
        request = {"arguments": words, "cwd": str(ROOT), "session": session, "environment": env}
        mine, theirs = socket.socketpair()
        with mine, theirs:
            files = (self._nothing if stream == subprocess.DEVNULL else stream for stream in streams)
            handles = [file if isinstance(file, int) else file.fileno() for file in files]
            socket.send_fds(self._requests, [json.dumps(request).encode()], [*handles, theirs.fileno()])
            theirs.close()
            return Forked(mine, words)

    def run(self, *arguments: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run what `python *arguments` would to its end, without a terminal."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(*arguments, streams=(subprocess.DEVNULL, out, err), **environment)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            for stream in (out, err):
                stream.seek(0)
            return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())

    def close(self) -> None:
        """End it, and what still runs of what it forked."""
        if FORKS:
            self._requests.close()
            os.close(self._nothing)
            self._server.wait()


if __name__ == "__main__":
    if sys.argv[2:]:
        load_libraries()
    serve(socket.socket(fileno=int(sys.argv[1])))
