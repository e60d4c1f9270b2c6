"""An answer that is printed as it is made says what cut it off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qingtune.cli import main

CONTEXT = 256  # tokens that the tiny model reads


@pytest.mark.parametrize(
    ("most", "limit"), [(2, "max_new_tokens"), (CONTEXT, "the end of the model's context")], ids=["limit", "context"]
)
def test_what_cut_an_answer(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], most: int, limit: str
) -> None:
    flags = ["--base_model", str(tiny()), "--prompt", "hi", "--temperature", "0", "--max_new_tokens", str(most)]
    assert main(["infer", *flags]) == 0
    assert capsys.readouterr().err.endswith(f"tok/s, cut at {limit}]\n")
