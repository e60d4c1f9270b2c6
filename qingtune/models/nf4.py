"""Weights stored in 4 bits (NF4) as bitsandbytes and Transformers lay them out: the packed weight under its own name,
its scales, tables and description under names that go on from it.

NF4: QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from qingtune.errors import UserError
from qingtune.files.json_files import parse_object
from qingtune.kernels.linear import NF4Linear
from qingtune.models.find import NF4_MARK

Parts = dict[str, torch.Tensor]


class Described(NamedTuple):
    """The shape [out, in] of a packed weight and the dtype in which it is unpacked."""

    shape: tuple[int, int]
    dtype: torch.dtype


def parts_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The packed weights among a model's tensors: weight -> its parts as `NF4Linear.restore` names them -> tensors."""
    names = list(names)
    packed = {name.removesuffix(NF4_MARK): dict[str, str]() for name in names if name.endswith(NF4_MARK)}
    for name in names:
        weight = name.partition(".weight.")[0].removesuffix(".weight") + ".weight"
        if weight in packed:
            packed[weight][name.removeprefix(weight).removeprefix(".") or "packed"] = name
    return packed


def stored_names(weight: str, parts: Parts) -> Parts:
    """The tensors of a packed weight by the names they are stored under; the inverse of `parts_of`."""
    return {weight if part == "packed" else f"{weight}.{part}": tensor for part, tensor in parts.items()}


def describe(description: torch.Tensor) -> Described:
    """Read what a packed weight says of itself.

    Args:
        description: uint8, JSON in UTF-8.

    Raises:
        ValueError: it is not one.
    """
    try:
        state = parse_object(bytes(description.tolist()), "its description")
        out_features, in_features = (int(size) for size in state["shape"])
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[state["dtype"]]
    except (UserError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its description cannot be read ({error})") from None
    return Described((out_features, in_features), dtype)


def unpack(described: Described, parts: Parts) -> torch.Tensor:
    """The weight [out, in] unpacked from its parts, in the dtype described.

    Raises:
        ValueError: they do not belong together.
    """
    return layer_of(described, parts, None).dequantize(described.dtype)


def layer_of(described: Described, parts: Parts, bias: torch.Tensor | None) -> NF4Linear:
    """The frozen layer whose packed weight this is, its codes as they are stored.

    Raises:
        ValueError: parts are missing or do not belong together.
    """
    numbers = math.prod(described.shape)
    try:
        layer = NF4Linear.restore(described.shape, parts, bias)
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its parts cannot be used ({error})") from None
    state: Any = layer.state
    blocks = -(-numbers // state.blocksize)
    nested = state.state2.absmax.numel() * state.state2.blocksize if state.nested else blocks
    if parts["packed"].numel() != -(-numbers // 2) or state.absmax.numel() != blocks or nested < blocks:
        raise ValueError("its parts do not belong together")
    return layer
