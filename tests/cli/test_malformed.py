"""Malformed files end in a message: a corpus of those that users make, and what a fuzzer makes of good ones."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows, load_tool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qingtune.cli import main
from qingtune.config.training import TrainConfig

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in instruction_rows(4)).encode()
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6) | st.sampled_from([b'"', b"\n", b"\\u", b"{"])
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", ["data", "configs"])
def test_the_corpus(kind: str, tmp_path: Path) -> None:
    corpus = load_tool("faults/fault_corpus")
    assert len(corpus.DATA) > 60
    assert len(corpus.CONFIGS) > 60
    assert getattr(corpus, f"check_{kind}")(tmp_path) == []


def run(*argv: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return main(argv), said.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
@FUZZ
@given(changes=CHANGES)
def test_any_data_file_is_read_or_told(
    suffix: str, changes: list[tuple[float, int, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = ROWS if suffix != "json" else b"[" + ROWS.strip().replace(b"\n", b",\n") + b"]"
    for place, removed, added in changes:
        start = round(place * len(content))
        content = content[:start] + added + content[start + removed :]
    Path(f"rows.{suffix}").write_bytes(content)
    code, said = run("check", "--data", f"rows.{suffix}", "--strict")
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert code == 0 or f"rows.{suffix}" in said
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("rows.")] == []


@FUZZ
@given(values=st.dictionaries(st.sampled_from(sorted(TrainConfig.model_fields)), VALUES, min_size=1, max_size=3))
def test_any_configuration_is_taken_or_told(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"output_dir", "cache_dir", "model_name_or_path"} & set(values)
    for name in names:  # what is a path may be any text
        del values[name]
    Path("rows.jsonl").write_bytes(ROWS)
    whole = {"model_name_or_path": "./none", "data_path": "rows.jsonl", **values}
    Path("config.json").write_text(json.dumps(whole))
    code, said = run("train", "--config_file", "config.json")
    assert code == 2, said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "rows.jsonl"]
