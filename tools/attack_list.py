"""All attacks, by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attack_adapters
import attack_models
import attack_tensors
import attack_tokenizers
from attack_case import Case, numbered

GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "config": attack_models.config_cases,
    "hub kernels": attack_models.hub_cases,
    "tokenizer files": attack_tokenizers.tokenizer_cases,
    "templates": attack_tokenizers.template_cases,
    "safetensors": attack_tensors.tensor_cases,
    "adapters": attack_adapters.adapter_cases,
    "forged turns": attack_tokenizers.forged_cases,
}


def all_cases(seed: int) -> list[Case]:
    """Every case, class by class."""
    return [case for cases in GROUPS.values() for case in numbered(cases(), seed)]
