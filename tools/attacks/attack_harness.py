"""Makes the fixtures, keeps the servers, and runs a case: copy, spoil, look, run the commands, look again, judge."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack_fixtures
from attack_case import SECRET, Argv, Case, Ended, Place
from attack_judge import Verdict, judge, snapshot

TOOLS = Path(__file__).resolve().parent
WITHIN_S = 60.0  # of wall time, for a command; a usual one takes one, and more where others use the cores too
FIXTURES = "fixtures"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "HF_TOKEN": SECRET, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120",
    "TERM": "xterm-256color",
}  # fmt: skip


class Server:
    """A process that runs commands of one package in forked children, one at a time."""

    def __init__(self, package: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.package = folder, package
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV") if name in os.environ}
        home = folder / "home"
        home.mkdir(exist_ok=True)
        environment = kept | _ENVIRONMENT | {"HOME": str(home), "QINGTUNE_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, str(TOOLS / "attack_server.py"), str(package)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(folder / "server.log").open("wb"), text=True, env=environment, cwd=folder,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the server ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
        return json.loads(line)

    def run(self, argv: Argv, cwd: Path, **more: Any) -> Ended:
        """Run a command in a folder; its streams and log are kept in the server's folder."""
        files = {name: self.folder / name for name in ("stdin", "out", "err", "log")}
        for path in files.values():
            path.write_bytes(b"")
        files["stdin"].write_bytes(more.pop("stdin", b""))
        request = {"argv": argv, "cwd": str(cwd), "seconds": WITHIN_S, "env": {}}
        answer = self.ask({**request, **{name: str(path) for name, path in files.items()}, **more})
        lines = [json.loads(line) for line in files["log"].read_text(encoding="utf-8").splitlines()]
        return Ended(
            tuple(argv), answer["code"], files["out"].read_bytes(), files["err"].read_bytes(), answer["cpu"],
            answer["killed"], tuple(tuple(line["ids"]) for line in lines if "ids" in line),
            tuple(line["reached"] for line in lines if "reached" in line),
        )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=30)


def make_fixtures(package: Path, root: Path, needs: set[str] | None = None) -> list[str]:
    """Make all that cases copy; returns the modules that the commands imported, for other servers.

    Args:
        package: the checkout whose commands make them.
        root: where; must not exist.
        needs: the only ones to make, where few are needed.

    Raises:
        RuntimeError: the package cannot do its ordinary work.
    """
    root.mkdir(parents=True)
    server = Server(package, root.parent / "maker")
    modules: set[str] = set()
    try:
        ended = server.run((str(root),), root, call="attack_fixtures:make_models", seconds=300)
        commands = [argv for argv in attack_fixtures.COMMANDS if needs is None or attack_fixtures.needed(argv, needs)]
        for argv in (None, *commands):
            if argv is not None:
                to = server.folder / "modules.json"
                ended = server.run(argv, root, seconds=300, modules_to=str(to))
                new = [*json.loads(to.read_text())]
                modules.update(new)
                server.ask({"modules": _importable(new)})
            if ended.code:
                raise RuntimeError(f"{ended.argv} ended with {ended.code}:\n{ended.shown[-3000:]}")
    finally:
        server.close()
    attack_fixtures.arrange(root)
    (root.parent / "maker" / "cache").mkdir(exist_ok=True)
    shutil.copytree(root.parent / "maker" / "cache", root / "cache", symlinks=True)
    return _importable(modules)


def _importable(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith(("__", "attack_")))


def new_server(package: Path, folder: Path, modules: list[str]) -> Server:
    """A server with the modules imported; its cache begins as that of the fixtures' maker, kernels compiled."""
    cache = folder.parent / "maker" / "cache"
    if cache.is_dir() and not (folder / "cache").exists():
        shutil.copytree(cache, folder / "cache", symlinks=True)
    server = Server(package, folder)
    server.ask({"modules": modules})
    return server


@dataclass(frozen=True)
class Result:
    """A case that was tried."""

    case: Case
    verdict: Verdict
    ended: tuple[Ended, ...]
    seconds: float


def make_place(case: Case, fixtures: Path, folder: Path) -> Place:
    """The folder of a case, with copies of the fixtures that it needs, and things that must stay as they are."""
    place = Place(folder, random.Random(case.seed))
    for path in (place.work, place.home, place.outside / "site"):
        path.mkdir(parents=True)
    (place.outside / "precious.txt").write_text("mine\n")
    (place.outside / "site" / "x.pth").write_text("# a stand-in for site-packages\n")
    (place.home / ".bashrc").write_text("# mine\n")
    for name in case.needs:
        source = fixtures / name
        if source.is_dir():
            shutil.copytree(source, place / name, symlinks=True)
        else:
            shutil.copy(source, place / name)
    return place


def try_case(case: Case, server: Server, fixtures: Path, folder: Path) -> Result:
    """Run a case in a folder of its own and judge it."""
    began = time.monotonic()
    place = make_place(case, fixtures, folder)
    try:
        case.spoil(place)
    except Exception as fault:
        return Result(case, Verdict((f"the suite's own fault: {fault!r}",)), (), time.monotonic() - began)
    before = snapshot(place.folder)
    ended: list[Ended] = []
    filled = {"outside": str(place.outside), "work": str(place.work), "home": str(place.home)}
    env = {name: value.format(**filled) if value is not None else None for name, value in case.env.items()}
    for number, argv in enumerate(case.commands):
        words = tuple(word.replace("{outside}", filled["outside"]).replace("{work}", filled["work"]) for word in argv)
        more: dict[str, Any] = {"env": {"HOME": str(place.home), **env}}
        if case.watch:
            more["watch"] = case.watch
        if number == 0 and case.process:
            more["harm"] = dict(case.process)
        if number == 1 and case.between is not None:
            case.between(place)
        ended.append(server.run(words, place.work, tty=case.tty, stdin=case.stdin, **more))
    verdict = judge(case, place, before, ended)
    return Result(case, verdict, tuple(ended), time.monotonic() - began)


def remove(folder: Path) -> None:
    """Remove a case's folder, also where a case took rights away."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
