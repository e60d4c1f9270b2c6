"""Schedules have Transformers' values at every step; every parameter is in one group, and only matrices decay."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model

from qingtune.config.training import TrainConfig
from qingtune.kernels.footprint import EIGHT_BITS
from qingtune.training.adamw8bit import AdamW8bit
from qingtune.training.optim import make_optimizer, make_schedule, parameter_groups, warmup_steps

KINDS = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


def transformers_values(kind: str, peak: float, warmup: int, total: int) -> list[float]:
    """The learning rate that each optimizer step uses."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(total - 1):
        optimizer.step()
        scheduler.step()
        values.append(optimizer.param_groups[0]["lr"])
    return values


@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (1, 20), (7, 20), (20, 20), (30, 20), (0, 1), (1, 1), (3, 200)])
@pytest.mark.parametrize("peak", [1e-4, 3e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_schedules_have_the_values_of_transformers(kind: str, peak: float, warmup: int, total: int) -> None:
    schedule = make_schedule(kind, peak, warmup, total)
    ours = [schedule(step) for step in range(total)]
    assert ours == pytest.approx(transformers_values(kind, peak, warmup, total), rel=1e-12, abs=0)


def test_every_schedule_of_the_configuration_is_there() -> None:
    assert set(KINDS) == set(TrainConfig.model_fields["lr_scheduler_type"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "total", "steps"),
    [
        ({}, 100, 0),
        ({"warmup_steps": 5}, 100, 5),
        ({"warmup_steps": 1}, 100, 1),
        ({"warmup_steps": 0.1}, 100, 10),
        ({"warmup_steps": 0.1}, 101, 11),
        ({"warmup_ratio": 0.03}, 100, 3),
        ({"warmup_ratio": 0.03}, 90, 3),
        ({"warmup_ratio": 0.001}, 90, 1),
        ({"warmup_ratio": 1}, 90, 90),
        ({"warmup_steps": 5, "warmup_ratio": 0.5}, 100, 5),
        ({"warmup_steps": 0.2, "warmup_ratio": 0.5}, 100, 20),
    ],
)
def test_warmup_is_a_number_or_a_share_rounded_up(settings: dict[str, Any], total: int, steps: int) -> None:
    assert warmup_steps(TrainConfig(**settings), total) == steps


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(kind: str) -> None:
    model = make_model(kind)
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [[id(parameter) for parameter in group["params"]] for group in groups]
    assert sorted(ids[0] + ids[1]) == sorted(id(parameter) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name or "ln_" in name
        assert (id(parameter) in ids[1]) == vector, name


def test_a_group_of_nothing_is_left_out() -> None:
    groups = parameter_groups([("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))], 0.1)
    assert [len(group["params"]) for group in groups] == [1]


def test_lora_plus_parts_the_b_matrices_and_vectors() -> None:
    """As in PEFT's create_loraplus_optimizer, but that no vector decays."""
    shapes = {"q.lora_A": (2, 2), "q.lora_B": (2, 2), "q.lora_magnitude_vector": (2,), "head": (2, 2)}
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {id(parameter): name for name, parameter in named.items()}
    groups = parameter_groups(named.items(), 0.1, 4.0)
    found = [([names[id(p)] for p in group["params"]], group["weight_decay"], group["lr_ratio"]) for group in groups]
    assert found == [
        (["q.lora_A", "head"], 0.1, 1.0),
        (["q.lora_B"], 0.1, 4.0),
        (["q.lora_magnitude_vector"], 0.0, 4.0),
    ]
    plain = parameter_groups(named.items(), 0.1)
    assert [len(group["params"]) for group in plain] == [3, 1]
    assert [group["lr_ratio"] for group in plain] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("adamw_8bit", AdamW8bit),
        ("adamw_bnb_8bit", AdamW8bit),
        ("paged_adamw_8bit", AdamW8bit),
        ("paged_adamw_32bit", torch.optim.AdamW),
    ],
)
def test_optimizers_take_their_settings(optim: str, kind: type[torch.optim.Optimizer]) -> None:
    config = TrainConfig(
        optim=optim, learning_rate=0.5, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    model = make_model("qwen2")
    optimizer, notice = make_optimizer(config, model.named_parameters(), torch.device("cpu"))
    assert type(optimizer) is kind
    assert (notice is not None) == (optim == "paged_adamw_32bit")
    assert notice is None or (optim in notice and "NVIDIA" in notice)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"]) == (0.5, decay)
        assert optim == "sgd" or (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


def test_8_bit_optimizers_come_from_bitsandbytes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "adamw_8bit": "AdamW8bit",
        "adamw_bnb_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
    }
    fake: Any = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(**{name: lambda *_, made=name, **__: made for name in names.values()})
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    assert {optim for optim in names if "8bit" in optim} == EIGHT_BITS
    for optim, name in names.items():
        config = TrainConfig(optim=optim, learning_rate=0.5)
        assert make_optimizer(config, make_model("qwen2").named_parameters(), torch.device("cuda")) == (name, None)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_decays_matrices_only(fused: bool) -> None:
    config = TrainConfig(optim="adamw_torch_fused" if fused else "adamw_torch", learning_rate=0.5, weight_decay=0.1)
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    optimizer, _ = make_optimizer(config, [("weight", matrix), ("bias", vector)], torch.device("cpu"))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.data, torch.full((2, 2), 1 - 0.5 * 0.1))
    torch.testing.assert_close(vector.data, torch.ones(2))
