"""The methods of training: how each is chosen, what each is called, and which settings belong to adapters alone."""

from __future__ import annotations

from typing import Any, Literal

Method = Literal["full", "lora", "qlora"]
TrainingMethod = Literal["full", "lora", "qlora4", "qlora8"]

METHOD_NAMES: dict[Method, str] = {"full": "full training", "lora": "LoRA", "qlora": "QLoRA"}

# The settings that choose each of the methods that `qingtune compare` trains.
METHOD_SETTINGS: dict[TrainingMethod, dict[str, Any]] = {
    "full": {},
    "lora": {"use_lora": True},
    "qlora4": {"use_qlora": True, "quantization_bit": 4},
    "qlora8": {"use_qlora": True, "quantization_bit": 8},
}

# Settings of adapters. Full training ignores the first ones, which scripts set for all methods, and refuses the others.
IGNORED_WITHOUT_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
REFUSED_WITHOUT_ADAPTERS = (
    "use_dora", "use_rslora", "init_lora_weights", "loraplus_lr_ratio", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "modules_to_save",
)  # fmt: skip
ADAPTER_SETTINGS = (*IGNORED_WITHOUT_ADAPTERS, *REFUSED_WITHOUT_ADAPTERS)


def method_of(use_lora: Any, use_qlora: Any) -> Method:
    """The method that two switches choose; use_qlora takes precedence, because scripts set both."""
    return "qlora" if use_qlora else "lora" if use_lora else "full"
