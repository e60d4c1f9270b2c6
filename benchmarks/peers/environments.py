"""The peers' virtual environments: each peer has pins that fit no other's, so each gets an environment of its own.

Made once, by pip from whatever index it is set up with, and kept until the pins change. torch comes first: an index
with CPU builds saves several GB of CUDA libraries that nothing here uses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

SYSTEMS = ("trl", "llamafactory", "ms-swift", "llama.cpp")
TORCH_VERSION = "2.13.0"
# Installed last and without what it asks for: LLaMA-Factory wants torchvision, torchaudio and gradio, which training on
# text never calls; torchaudio's build on PyPI (2.11.0) does not load beside a CPU torch. Its pins hold what it needs.
ALONE = {"llamafactory": "llamafactory==0.9.5"}


def make_environment(system: str, folder: Path, cmake: str = "") -> Path | str:
    """Make a peer's environment in `folder/system`, or find it made.

    Args:
        system: one of SYSTEMS.
        folder: where the environments are kept; beside each lies pip's log.
        cmake: CMAKE_ARGS, for what is compiled; with any, the environment is another one.

    Returns:
        The interpreter's path; or why there is none, in one line.
    """
    pins = Path(__file__).with_name(f"requirements_{system}.txt")
    name = f"{system}-{hashlib.sha256(cmake.encode()).hexdigest()[:8]}" if cmake else system
    home = folder / name
    marker = home / "made_from.txt"
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    recipe = f"{TORCH_VERSION}\n{ALONE.get(system)}\n{pins.read_text(encoding='utf-8')}{cmake}"
    if marker.is_file() and marker.read_text(encoding="utf-8") == recipe:
        return python
    if sys.version_info < (3, 11):
        return "the pins need Python 3.11 or newer"
    shutil.rmtree(home, ignore_errors=True)
    log = folder / f"{name}.log"
    try:
        venv.create(home, with_pip=True)
        _install_all(python, system, pins, log, cmake)
    except subprocess.CalledProcessError:
        return f"pip failed: {_complaint(log)}; all of it stands in {log}"
    except OSError as error:
        return f"its environment could not be made: {error}"
    marker.write_text(recipe, encoding="utf-8")
    return python


def _install_all(python: Path, system: str, pins: Path, log: Path, cmake: str) -> None:
    log.write_text("", encoding="utf-8")
    if cmake:  # pip would take from its cache what it has compiled otherwise
        _install(python, log, "--no-cache-dir", "-r", str(pins), env={**os.environ, "CMAKE_ARGS": cmake})
        return
    if "\ntorch==" in "\n" + pins.read_text(encoding="utf-8"):
        _install(python, log, f"torch=={TORCH_VERSION}")
    _install(python, log, "-r", str(pins))
    if system in ALONE:
        _install(python, log, "--no-deps", ALONE[system])


def _install(python: Path, log: Path, *what: str, env: dict[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *what]
    with log.open("a", encoding="utf-8") as output:
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT, env=env)


def _complaint(log: Path) -> str:
    """The last error that pip wrote."""
    if not log.is_file():
        return "no log"
    errors = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("ERROR")]
    return errors[-1].removeprefix("ERROR: ") if errors else "no error in its log"


if __name__ == "__main__":
    for name in sys.argv[2:] or SYSTEMS:
        print(name, make_environment(name, Path(sys.argv[1])))
