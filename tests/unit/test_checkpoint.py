"""A checkpoint takes no second copy of the optimizer's states, and keeps those that share memory apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qingtune.training import checkpoint
from qingtune.training.checkpoint import load_checkpoint, save_checkpoint
from qingtune.training.loop import Progress

NAMES = ("a", "b")


def trained_once() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Two parameters, and an optimizer after a step."""
    torch.manual_seed(0)
    trained = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in NAMES}
    optimizer = torch.optim.AdamW([*trained.values()])
    for parameter in trained.values():
        parameter.grad = torch.randn(4, 3)
    optimizer.step()
    return trained, optimizer


def test_states_are_written_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, optimizer = trained_once()
    written: dict[str, torch.Tensor] = {}
    save = checkpoint.save_file

    def watch(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.update(tensors)
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", watch)
    save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {})
    for name in NAMES:
        for key in ("exp_avg", "exp_avg_sq"):
            assert written[f"{name}::{key}"].data_ptr() == optimizer.state[trained[name]][key].data_ptr()


def test_states_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    trained, optimizer = trained_once()
    table, both = torch.arange(5.0), torch.arange(24.0)
    for number, parameter in enumerate(trained.values()):
        state: dict[str, Any] = optimizer.state[parameter]
        state["table"] = table
        state["exp_avg"] = both[12 * number : 12 * (number + 1)].view(4, 3)
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {})
    again, fresh = trained_once()
    load_checkpoint(folder, again, fresh)
    for number, parameter in enumerate(again.values()):
        assert torch.equal(fresh.state[parameter]["table"], table)
        assert torch.equal(fresh.state[parameter]["exp_avg"].flatten(), both[12 * number : 12 * (number + 1)])
