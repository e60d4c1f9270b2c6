"""A checkpoint takes no second copy of the optimizer's states, and keeps those that share memory apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qingtune.errors import UserError
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


def test_counts_of_steps_stay_where_the_optimizer_reads_them(tmp_path: Path) -> None:
    trained, optimizer = trained_once()
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {})
    for fused, device in ((False, "cpu"), (True, "meta")):
        elsewhere = {name: torch.nn.Parameter(torch.empty(4, 3, device="meta")) for name in NAMES}
        fresh = torch.optim.AdamW([*elsewhere.values()])
        fresh.param_groups[0]["fused"] = fused
        load_checkpoint(folder, elsewhere, fresh)
        for parameter in elsewhere.values():
            assert fresh.state[parameter]["step"].device.type == device
            assert fresh.state[parameter]["exp_avg"].device.type == "meta"


class Paged(torch.optim.SGD):
    """As bitsandbytes' paged optimizers: states live in buffers that they make themselves."""

    is_paged = True

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        self.pages = [*getattr(self, "pages", []), buffer]
        return buffer


def test_paged_states_go_back_to_pages(tmp_path: Path) -> None:
    trained, optimizer = trained_once()
    for parameter in trained.values():
        optimizer.state[parameter] = {"state1": torch.randn(4, 3), "absmax1": torch.ones(1), "step": 3}
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {})
    again, _ = trained_once()
    fresh = Paged([*again.values()], lr=0.1)
    load_checkpoint(folder, again, fresh)
    states = [fresh.state[parameter] for parameter in again.values()]
    assert [id(state["state1"]) for state in states] == [id(page) for page in fresh.pages]
    for parameter, state in zip(trained.values(), states, strict=True):
        assert torch.equal(state["state1"], optimizer.state[parameter]["state1"])
        assert state["step"] == 3


def test_the_scale_of_the_loss_is_kept(tmp_path: Path) -> None:
    trained, optimizer = trained_once()
    scaler, fresh = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (128.0, 65536.0))
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {}, scaler)
    load_checkpoint(folder, *trained_once(), fresh)
    assert fresh.state_dict() == scaler.state_dict()
    off = torch.amp.GradScaler("cpu", enabled=False)
    load_checkpoint(folder, *trained_once(), off)
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=2), {}, {}, off)
    load_checkpoint(folder, *trained_once(), fresh)
    assert fresh.get_scale() == 128.0


@pytest.mark.parametrize(
    ("scaler", "message"),
    [
        ([1], '"scaler" is'),
        ({"scale": "x"}, '"scale" is "x"'),
        ({"scale": 2.0}, "the scale of the loss cannot be loaded"),
    ],
    ids=str,
)
def test_a_scale_of_another_kind_is_named(tmp_path: Path, scaler: Any, message: str) -> None:
    trained, optimizer = trained_once()
    folder = save_checkpoint(tmp_path, trained, optimizer, Progress(step=1), {}, {})
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps({**state, "scaler": scaler}), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder, *trained_once(), torch.amp.GradScaler("cpu"))
