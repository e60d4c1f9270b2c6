"""What a launcher's environment says of a run's processes, and what of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qingtune.errors import UserError
from qingtune.machine.describe import describe_processes, launched_processes

NAMES = ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_FSDP": "1"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}, "sequence parallelism"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
            "sharded data parallelism",
        ),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(
    environment: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment variable {name}: {kind} is not supported") as refusal:
        launched_processes()
    assert f"Turn {kind} off" in str(refusal.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "false"},
        {"ACCELERATE_USE_DEEPSPEED": ""},
        {"PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1"},
    ],
)
def test_data_parallelism_is_not_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == 1


def test_the_refusal_comes_before_torch_is_loaded(
    tmp_path: Path, data_file: Path, run: Callable[..., CompletedProcess[str]]
) -> None:
    flags = [
        "train",
        "--model_name_or_path",
        "model",
        "--data_path",
        str(data_file),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    code = f"import sys; from qingtune.cli import main; print(main({flags}), 'torch' in sys.modules)"
    ended = run("-c", code, ACCELERATE_USE_DEEPSPEED="true")
    assert ended.stdout == "2 False\n"
    assert "DeepSpeed is not supported" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "count", "line"),
    [
        ({}, 1, None),
        ({"MASTER_PORT": "29500"}, 1, None),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29500"}, 2, "Processes: 2. "),
        ({"WORLD_SIZE": "4"}, 1, "Warning: the launcher asked for 4 processes, but this run has 1. Use torchrun "),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "Warning: the launcher asked for 2 processes, but this run has 1. "),
        (
            {"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"},
            1,
            "Warning: accelerate launch was asked for several processes, but started one",
        ),
    ],
)
def test_the_number_of_processes_is_reported_where_it_matters(
    environment: dict[str, str], count: int, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = describe_processes(count)
    assert (found or "").startswith(line or "")
    assert (found is None) is (line is None)
