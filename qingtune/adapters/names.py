"""Which modules a setting means, by their full names alone: no model is needed, and no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from qingtune.config.patterns import parse_pattern
from qingtune.errors import UserError

# What an expert of a mixture holds as one matrix, and the names that a dense layer has for its parts.
_JOINED, _PARTS = "experts.gate_up_proj", {"gate_proj", "up_proj"}


def ends_with(layer: str, name: str) -> bool:
    """Whether a layer's full name is `name` or ends with it at a dot, as PEFT matches."""
    return layer == name or layer.endswith(f".{name}")


def is_within(name: str, module: str) -> bool:
    """Whether a full name is a module's or that of something in it."""
    return name == module or name.startswith(f"{module}.")


def match_names(layers: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The linear layers to adapt, in their own order.

    Named together, gate_proj and up_proj mean an expert's gate_up_proj too.

    Args:
        layers: full names of all linear layers but the head, and of experts' matrices.
        names: last parts (q_proj) or longer ends (layers.0.self_attn.q_proj) of names; None for all.

    Raises:
        UserError: a name matches nothing.
    """
    if names is None:
        return list(layers)
    both = set(names) >= _PARTS

    def means(name: str, layer: str) -> bool:
        return ends_with(layer, name) or (both and name in _PARTS and ends_with(layer, _JOINED))

    problems = [name for name in names if not any(means(name, layer) for layer in layers)]
    if problems:
        existing = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
        near = difflib.get_close_matches(problems[0], existing, n=1)
        guess = f' Did you mean "{near[0]}"?' if near else ""
        missing = ", ".join(f'"{name}"' for name in problems)
        raise UserError(
            f"{missing} matches no linear layer of this model",
            where="lora_target_modules",
            fix=f"There are {', '.join(existing)}.{guess}",
        )
    return [layer for layer in layers if any(means(name, layer) for name in names)]


def pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first key that a layer's full name is, or ends with at a dot, keys being regular expressions.

    This is PEFT's rule for rank_pattern and alpha_pattern (peft.utils.other.get_pattern_key).

    Raises:
        PatternError: a key is no regular expression.
    """
    return next((value for key, value in pattern.items() if parse_pattern(key)(name)), default)


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that a module belongs to, from its full name; the first number, as in PEFT."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None


def choose_layers(
    names: Sequence[str], wanted: Sequence[int] | None, patterns: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Those of the layers' full names that are to be adapted.

    Args:
        wanted: numbers of decoder layers; None for all.
        patterns: rank_pattern and alpha_pattern, by these names.

    Raises:
        UserError: a layer's number or a pattern's key fits none of them.
    """
    existing = {layer_number(name) for name in names}
    if missing := [number for number in wanted or () if number not in existing]:
        numbers = sorted(number for number in existing if number is not None)
        raise UserError(
            f"there is no layer {missing[0]} to adapt in this model",
            where="layers_to_transform",
            fix=f"Its layers are {numbers[0]} to {numbers[-1]}." if numbers else "Leave it out.",
        )
    chosen = [name for name in names if wanted is None or layer_number(name) in wanted]
    for setting, pattern in patterns.items():
        for key, value in pattern.items():
            if not any(pattern_value({key: value}, name, 0) for name in chosen):
                raise UserError(f'"{key}" does not match any adapted layer', where=setting)
    return chosen
