"""The lock file holds what is asked for, nothing of torch, and a hash for everything."""

from __future__ import annotations

import re

from conftest import ROOT


def pins(name: str) -> dict[str, set[str]]:
    """Package -> its versions, for all Pythons."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(encoding="utf-8")):
        found.setdefault(package.lower().replace("_", "-"), set()).add(version)
    return found


def test_the_lock_is_up_to_date() -> None:
    wanted, locked = pins("requirements_stable.txt"), pins("requirements_lock.txt")
    del wanted["torch"]
    assert {name: locked.get(name) for name in wanted} == wanted


def test_everything_locked_has_a_hash_and_torch_is_free() -> None:
    text = (ROOT / "requirements_lock.txt").read_text(encoding="utf-8")
    entries = re.split(r"(?m)^(?=[a-z])", text)[1:]
    assert len(entries) > 60
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"(?m)^(torch|triton|nvidia-|cuda-)", text)


def test_every_package_is_installed() -> None:
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "qingtune").rglob("__init__.py")}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\npackages = [")[2].partition("]")[0]
    assert set(re.findall(r'"([a-z_.]+)"', listed)) == there | {"qingtune.bundled"}
