"""Adapters as files that PEFT reads: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.lora import LoRALinear, add_lora, lora_layers
from qingtune.adapters.targets import ends_with, linear_layers
from qingtune.errors import UserError

_PREFIX = "base_model.model."

# Settings of PEFT that change what an adapter computes and that are not supported: each with the value that is.
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "lora_bias": False,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}

# Values of init_lora_weights that leave the base's weights alone. The others (pissa, olora, corda, loftq, lora_ga) take
# something out of them first, which the adapter's file alone does not tell.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(model: Any, folder: Path, base_model: str, dropout: float) -> None:
    """Write a model's adapters.

    Args:
        model: a model with LoRALinear layers, all of one rank and scaling.
        folder: exists; the two files are written into it.
        base_model: name of the base, kept in the configuration.
        dropout: kept in the configuration.
    """
    from peft import LoraConfig

    adapters = lora_layers(model)
    first = next(iter(adapters.values()))
    tensors = {
        f"{_PREFIX}{name}.{part}.weight": getattr(adapter, part).detach().float().cpu().contiguous()
        for name, adapter in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=first.r,
        lora_alpha=_whole_if_whole(first.scaling * first.r),
        lora_dropout=dropout,
        target_modules=_shortest_names(model, adapters),
        fan_in_fan_out=isinstance(first.base, Conv1D),
        inference_mode=True,
    ).save_pretrained(str(folder))


def _whole_if_whole(value: float) -> Any:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _shortest_names(model: Any, adapters: dict[str, LoRALinear]) -> list[str]:
    """The last parts of the adapted layers' names, if they match no other layer; else the full names."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    others = [name for name in linear_layers(model) if name.removesuffix(".base") not in adapters]
    clash = any(ends_with(other, part) for other in others for part in last_parts)
    return sorted(adapters) if clash else last_parts


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        UserError: no adapter here, or one of a kind that is not supported.
    """
    path = folder / "adapter_config.json"
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "no adapter_config.json here, so this is no adapter folder", where=str(folder), fix="Check the path."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"an adapter of kind {config.get('peft_type')!r}; LoRA is supported", where=str(path))
    used = [name for name, value in _UNSUPPORTED.items() if config.get(name, value) not in (value, None, [], {})]
    if config.get("init_lora_weights") not in _STARTS:
        used.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if used:
        raise UserError(f"the adapter uses {', '.join(used)}, which is not supported here", where=str(path))
    return config


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by names of the model's such as `model.layers.0.mlp.up_proj.lora_A.weight`.

    Raises:
        UserError: the file is missing or broken.
    """
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise UserError("adapter_model.safetensors is missing", where=str(folder), fix="Is the folder complete?")
    try:
        return {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"broken safetensors file ({error})", where=str(path), fix="Copy it again.") from None


def load_adapter(model: Any, folder: Path) -> dict[str, LoRALinear]:
    """Put an adapter's layers on a model and load their weights; written here or by PEFT.

    Raises:
        UserError: the files are missing or broken, or do not fit this model.
    """
    config = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    unknown = sorted(names - set(linear_layers(model)))
    modules = dict(model.named_modules())
    if other := [name for name in unknown if name.split(".base_layer")[0] in modules]:
        raise UserError(
            f"the adapter changes {other[0].split('.base_layer')[0]}, which is no layer that LoRA is put on here",
            where=str(folder),
        )
    if unknown:
        raise UserError(
            f"the adapter is for another model: this one has no layer {unknown[0]}",
            where=str(folder),
            fix="Name the base model that the adapter was trained on.",
        )
    adapters = add_lora(model, sorted(names), int(config["r"]), float(config["lora_alpha"]), 0.0)
    for name, adapter in adapters.items():
        for part in ("lora_A", "lora_B"):
            _copy(tensors.get(f"{name}.{part}.weight"), getattr(adapter, part), f"{name}.{part}", folder)
    return adapters


def _copy(tensor: torch.Tensor | None, parameter: torch.nn.Parameter, name: str, folder: Path) -> None:
    if tensor is None or tensor.shape != parameter.shape:
        found = "missing" if tensor is None else f"{list(tensor.shape)}"
        raise UserError(
            f"the adapter does not fit: {name} is {found}, {list(parameter.shape)} is wanted",
            where=str(folder),
            fix="Name the base model that the adapter was trained on.",
        )
    with torch.no_grad():
        parameter.copy_(tensor)
