"""All attacks, by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attack_adapters
import attack_caches
import attack_data
import attack_folders
import attack_generation
import attack_gguf
import attack_models
import attack_processes
import attack_settings
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
    "GGUF": attack_gguf.gguf_cases,
    "generation_config and Modelfile": attack_generation.generation_cases,
    "forged turns": attack_tokenizers.forged_cases,
    "data": attack_data.data_cases,
    "folders, links and pages": attack_folders.folder_cases,
    "settings": attack_settings.settings_cases,
    "caches and checkpoints": attack_caches.cache_cases,
    "compare": attack_caches.compare_cases,
    "processes": attack_processes.process_cases,
}


def all_cases(seed: int) -> list[Case]:
    """Every case, class by class."""
    return [case for cases in GROUPS.values() for case in numbered(cases(), seed)]
