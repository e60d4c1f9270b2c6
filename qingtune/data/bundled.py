"""The bundled samples: rows that no bundled configuration trains on, and their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qingtune.data.format import Message
from qingtune.data.prompts import rows_with_prompts

BUNDLED_SHOWN = 3


def bundled_prompts(*, chinese: bool) -> Iterable[tuple[dict[str, Any], Sequence[Message]]]:
    """The first bundled held-out rows, with their prompts."""
    path = str(bundled_heldout(chinese=chinese))
    for _, (values, prompt) in zip(range(BUNDLED_SHOWN), rows_with_prompts(path), strict=False):
        assert not isinstance(prompt, str)
        yield values, prompt


def bundled_heldout(*, chinese: bool) -> Path:
    """The bundled samples that no bundled configuration trains on."""
    return bundled_data() / ("store_xhs_heldout.jsonl" if chinese else "store_posts_en_heldout.jsonl")


def bundled_data() -> Path:
    """The folder of bundled samples: data/ of a checkout, or the copy inside an installed package."""
    package = Path(__file__).parent.parent
    checkout = package.parent / "data"
    return checkout if (checkout / "store_xhs_heldout.jsonl").exists() else package / "bundled"
