"""Adapters of experts as PEFT's files hold them (target_parameters, peft.tuners.lora.layer.ParamWrapper).

A parameter [E, out, in] has A [E r, in], an expert's r rows after another's, and B [out, r E], in which the experts of
one rank lie side by side. PEFT wraps a module once for each of its parameters that is adapted, so that the tensors of
the first are named `experts.base_layer.lora_A.weight` and those of the last `experts.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qingtune.adapters.names import ends_with
from qingtune.adapters.variants import LowRankStack
from qingtune.errors import UserError
from qingtune.kernels.experts.modules import MATRICES

_INNER = ".base_layer"


def stack_tensors(stacks: Mapping[str, LowRankStack]) -> dict[str, torch.Tensor]:
    """The tensors of adapters, by the full names of the matrices that they change, under the names of PEFT's files."""
    tensors: dict[str, torch.Tensor] = {}
    for name, stack in stacks.items():
        module, _, matrix = name.rpartition(".")
        inner = matrix == MATRICES[0] and f"{module}.{MATRICES[1]}" in stacks
        place = module + _INNER * inner
        tensors[f"{place}.lora_A.weight"] = stack.a.flatten(0, 1)
        tensors[f"{place}.lora_B.weight"] = stack.b.permute(1, 2, 0).flatten(1)
    return tensors


def target_parameters(adapted: Iterable[str], existing: Sequence[str]) -> list[str]:
    """The names that PEFT finds the adapted matrices by and no other: ends of names, if they do, else full names."""
    adapted = set(adapted)
    ends = sorted({".".join(name.split(".")[-2:]) for name in adapted})
    reached = {name for name in existing if any(ends_with(name, end) for end in ends)}
    return ends if reached == adapted else sorted(adapted)


def other_parameters(config: Mapping[str, Any]) -> list[str]:
    """The target_parameters of an adapter_config.json that are no experts' matrices."""
    return [name for name in config.get("target_parameters") or () if name.rpartition(".")[2] not in MATRICES]


def take_stacks(
    tensors: dict[str, torch.Tensor], config: Mapping[str, Any], scaling: Callable[[str], tuple[int, float]], where: str
) -> dict[str, LowRankStack]:
    """Take the adapters of experts out of an adapter's tensors.

    Args:
        tensors: by the names of the model, `lora_A.weight` and `lora_B.weight` after them.
        config: adapter_config.json.
        scaling: the full name of matrices -> their rank and scaling.
        where: the folder, for messages.

    Returns:
        by the full names of the matrices that they change.

    Raises:
        UserError: they do not fit together.
    """
    targets: list[str] = config.get("target_parameters") or []
    places = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    stacks: dict[str, LowRankStack] = {}
    for place in sorted(places):
        module = place.removesuffix(_INNER)
        found = [f"{module}.{matrix}" for matrix in MATRICES]
        found = [name for name in found if any(ends_with(name, target) for target in targets)]
        if not found or module.rpartition(".")[2] != "experts":
            continue
        name = found[0] if place.endswith(_INNER) else found[-1]
        a, b = (tensors.pop(f"{place}.lora_{part}.weight", None) for part in "AB")
        rank, factor = scaling(name)
        if (
            a is None
            or b is None
            or a.dim() != 2
            or b.dim() != 2
            or len(a) % rank
            or b.shape[1] != len(a)
            or not len(a)
        ):
            shapes = " and ".join("nothing" if one is None else str(list(one.shape)) for one in (a, b))
            raise UserError(f"{name}: {shapes} are not a LoRA pair of rank {rank} for each expert", where=where)
        b = b.float().unflatten(1, (rank, -1)).permute(2, 0, 1)
        stacks[name] = LowRankStack(a.float().unflatten(0, (-1, rank)), b.contiguous(), factor)
    return stacks
