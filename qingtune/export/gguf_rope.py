"""How positions turn heads, as llama.cpp reads it from a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qingtune.export.gguf_architectures import Architecture, Value, head_dim_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALINGS = "default, linear, yarn, for llama llama3 and for phi3 longrope can be exported."


class RopeNotExpressible(Exception):
    """llama.cpp would turn heads in another way; the text says why."""


@dataclass(frozen=True)
class Rope:
    """What stretches the positions beyond those of pretraining.

    Attributes:
        settings: without the architecture's name in front.
        constants: further tensors of the file, fp32.
        limits: where llama.cpp differs, in sentences.
    """

    settings: dict[str, Value] = field(default_factory=dict[str, Value])
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict[str, "NDArray[np.float32]"])
    limits: list[str] = field(default_factory=list[str])


def rope_of(config: Any) -> Mapping[str, Any]:
    """The settings of rotary positions; where layers differ, those of layers with full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def rope_in_gguf(config: Any, architecture: Architecture) -> Rope:
    """What a file holds of a model's scaling of positions; RopeNotExpressible if llama.cpp has none such."""
    rope = rope_of(config)
    scaling = rope.get("rope_type", "default")
    if scaling == "default":
        return Rope()
    if scaling == "linear":
        return Rope({"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])})
    if scaling == "yarn":
        return Rope(_yarn(config, rope, architecture))
    if architecture.name == "llama" and (scaling == "llama3" or _is_one_set(rope)):
        return Rope(constants={"rope_freqs.weight": _factors(config, scaling)})
    if scaling == "longrope" and architecture.name == "phi3":
        return _longrope(config, rope)
    raise RopeNotExpressible(f"its rope_type {scaling}")


def _attention_factor(config: Any, scaling: str) -> float:
    """By what Transformers multiplies cosines and sines."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return float(ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))[1])


def _yarn(config: Any, rope: Mapping[str, Any], architecture: Architecture) -> dict[str, Value]:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071).

    llama.cpp multiplies cosines and sines by 1 + 0.1 ln(factor), divided by 1 + 0.1 m ln(factor) where the file has a
    multiplier m (mscale_all_dim, with an mscale of 1), and by what else the file has as attn_factor.
    """
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    settings: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    if architecture.reads_yarn:
        settings |= {f"rope.scaling.yarn_{name}": float(rope.get(name) or usual) for name, usual in betas.items()}
    fixed = {"truncate": True, **({} if architecture.reads_yarn else betas)}
    if unlike := [f"{name} {rope[name]}" for name, usual in fixed.items() if rope.get(name) not in (None, usual)]:
        raise RopeNotExpressible(f"its rope_type yarn with {', '.join(unlike)}")
    theirs = _mscale(factor, 1.0)
    if architecture.reads_yarn and rope.get("mscale") == 1 and rope.get("mscale_all_dim"):
        multiplier = float(rope["mscale_all_dim"])
        settings["rope.scaling.yarn_log_multiplier"] = multiplier
        theirs /= _mscale(factor, multiplier)
    ours = _attention_factor(config, "yarn")
    if not math.isclose(ours, theirs, rel_tol=1e-6):
        settings["rope.scaling.attn_factor"] = ours / theirs
    return settings


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(config: Any, rope: Mapping[str, Any]) -> Rope:
    """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): factors for short texts, others for long ones."""
    original = int(rope["original_max_position_embeddings"])
    return Rope(
        {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": _attention_factor(config, "longrope"),
        },
        {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        },
        [
            f"LongRoPE: llama.cpp takes the factors for long texts where its context (-c) is above {original:,}, "
            f"Transformers where the text is: for shorter texts, pass -c {original}."
        ],
    )


def _is_one_set(rope: Mapping[str, Any]) -> bool:
    """Whether this is LongRoPE with the same factors for all texts, as models that come from GGUF have it."""
    factors = rope.get("short_factor")
    return factors is not None and factors == rope.get("long_factor") and rope.get("attention_factor") == 1


def _factors(config: Any, scaling: str) -> NDArray[np.float32]:
    """By what llama.cpp divides each of a head's frequencies, fp32 [head_dim / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = head_dim_of(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    return (plain / scaled.double()).float().numpy()
