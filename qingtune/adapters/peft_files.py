"""Adapters as files that PEFT reads: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.expert_lora import expert_adapters, expert_shapes, low_rank, wrap_experts
from qingtune.adapters.full_modules import is_tied, modules_of, tied_modules, trained_in_full, untie
from qingtune.adapters.lora import DoRALinear, LoRALinear, lora_layers, shape_of
from qingtune.adapters.merge_stored import StoredAdapter
from qingtune.adapters.names import ends_with, pattern_value
from qingtune.adapters.peft_experts import other_parameters, stack_tensors, take_stacks, target_parameters
from qingtune.adapters.variants import TAKEN, LowRank, LowRankStack, scaling_of
from qingtune.config.patterns import PatternError, parse_pattern
from qingtune.errors import UserError, shorten
from qingtune.files.foreign import foreign_files
from qingtune.files.json_files import (
    FLAG,
    TEXT,
    check_fields,
    either,
    list_of,
    number,
    object_of,
    read_object_if_there,
    whole,
)
from qingtune.files.paths import refuse_odd_name
from qingtune.files.weights_file import check_floats, read_header
from qingtune.kernels.experts.modules import ExpertAdapter
from qingtune.kernels.linear import QuantizedLinear, import_bitsandbytes
from qingtune.models.layers import dense_weight, device_of, linear_layers, replace_layer
from qingtune.models.multimodal import OUTSIDE_PATTERN, multimodal_name, text_name

WEIGHTS = "adapter_model.safetensors"
MOST_RANK, MOST_ALPHA = 2**20, 1e9
MOST_VALUE = 2.0**38  # so that a product of two, summed over any rank and scaled by any alpha, is finite in fp32
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"

# Settings of PEFT that change what an adapter computes, supported only when off: null, false, "none" or empty.
# Those that only say which layers are adapted (exclude_modules, layers_to_transform) are not among them: the tensors'
# names tell the same.
_UNSUPPORTED = (
    "bias", "trainable_token_indices", "lora_bias", "layer_replication", "megatron_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip

_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
_KINDS = {
    **dict.fromkeys(("peft_type", "base_model_name_or_path"), TEXT),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying"), FLAG),
    "r": whole(1, MOST_RANK),
    "lora_alpha": number(above=0, most=MOST_ALPHA),
    "target_parameters": list_of(TEXT),
    "rank_pattern": object_of(whole(1, MOST_RANK)),
    "alpha_pattern": object_of(number(above=0, most=MOST_ALPHA)),
    "modules_to_save": list_of(TEXT),
    "init_lora_weights": either(FLAG, TEXT),
}

# Values of init_lora_weights that leave the base's weights alone.
_LEAVE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Values that take something out of them first, which can be found again from the base. What the others (corda, loftq,
# lora_ga, pissa_niter_...) take is decided by data or drawn at random, and the adapter's file does not tell it.
_FOUND_AGAIN = ("pissa", "olora")


def save_adapter(model: Any, folder: Path, base_model: str, dropout: float, *, multimodal: bool = False) -> None:
    """Write a model's adapters and modules trained in full, for the base's weights as they were loaded.

    Adapters that began as a part of these weights (PiSSA, OLoRA) become plain LoRA of twice the rank, so that every
    tool that reads LoRA computes the same.

    Args:
        folder: exists; the two files are written into it.
        base_model: name of the base, kept in the configuration as dropout is.
        multimodal: whether the base is a multimodal model, of which this is the model of text: tensors are named as in
            the multimodal one, for which PEFT opens the adapter; ends of names that both have tell the layers.
    """
    own = multimodal_name if multimodal else str

    def end(name: str) -> str:
        return name if own(name) == name else name.removeprefix("model.")

    import_bitsandbytes()
    from peft import LoraConfig

    layers, experts = lora_layers(model), expert_adapters(model)
    stored = {name: adapter.low_rank() for name, adapter in layers.items()}
    stacks = {name: low_rank(adapter) for name, adapter in experts.items()}
    whole = trained_in_full(model)
    tensors = {name: parameter.detach().float().cpu().clone() for name, parameter in whole.items()}
    for name, low in stored.items():
        tensors |= {f"{name}.lora_A.weight": low.a, f"{name}.lora_B.weight": low.b}
        if low.magnitude is not None:
            tensors[f"{name}{_MAGNITUDE}"] = low.magnitude
    tensors |= stack_tensors(stacks)
    named = {f"{_PREFIX}{own(name)}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    first = next(iter([*layers.values(), *experts.values()]))
    rank_stabilised = first.rank_stabilised and not (isinstance(first, LoRALinear) and first.taken)
    ranks = {name: len(low.a) for name, low in stored.items()} | {name: one.r for name, one in experts.items()}
    alphas = {
        name: _tidy(low.scaling * (math.sqrt(ranks[name]) if rank_stabilised else ranks[name]))
        for name, low in (stored | stacks).items()
    }
    r, alpha = _commonest(ranks), _commonest(alphas)
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=r,
        lora_alpha=alpha,
        rank_pattern={end(name): value for name, value in ranks.items() if value != r},
        alpha_pattern={end(name): value for name, value in alphas.items() if value != alpha},
        lora_dropout=0.0 if experts else dropout,  # PEFT refuses to open adapters of experts with another value
        target_modules=[end(name) for name in _names_of_targets(model, layers, multimodal=multimodal)],
        target_parameters=[end(name) for name in target_parameters(experts, _matrices(model))] or None,
        exclude_modules=OUTSIDE_PATTERN if multimodal else None,
        modules_to_save=[own(name) for name in modules_of(whole)] or None,
        use_dora=isinstance(first, DoRALinear),
        use_rslora=rank_stabilised,
        fan_in_fan_out=isinstance(first, LoRALinear) and isinstance(first.base, Conv1D),
        inference_mode=True,
    ).save_pretrained(str(folder))


def _matrices(model: Any) -> list[str]:
    """The matrices of experts by their names in a model without adapters."""
    return [name.replace(".experts.base.", ".experts.") for name in expert_shapes(model)]


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _tidy(value: float) -> Any:
    """A number without the noise of multiplying what was divided; whole ones without a point."""
    tidy = float(f"{value:.12g}")
    return round(tidy) if tidy == round(tidy) else tidy


def _names_of_targets(model: Any, adapters: dict[str, LoRALinear], *, multimodal: bool) -> list[str]:
    """The last parts of the adapted layers' names, if they match no other layer; else the full names.

    A multimodal model has layers that are not here, as of a vision tower, with the same last parts.
    """
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in adapters})
    others = [name for name in linear_layers(model) if name.removesuffix(".base") not in adapters]
    clash = any(ends_with(other, part) for other in others for part in last_parts)
    return sorted(adapters) if clash or multimodal else last_parts


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; a UserError if there is no adapter, or one of a kind that is not supported."""
    refuse_odd_name(folder, "the adapter")
    path = folder / "adapter_config.json"
    config = read_object_if_there(path)
    if config is None:
        if (folder / "config.json").exists() or (folder.suffix == ".gguf" and folder.is_file()):
            fix = "Pass it as --base_model, without --lora_model."
            raise UserError("this is a whole model, not an adapter", where=str(folder), fix=fix)
        if not folder.exists():
            raise UserError("there is no such folder", where=str(folder), fix="Check the path.")
        what = "no adapter_config.json here: this is not an adapter folder"
        raise UserError(what, where=str(folder), fix="Check the path.")
    check_fields(config, _KINDS, str(path))
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in config.get(setting) or ():
            try:
                parse_pattern(key)
            except PatternError as error:
                raise UserError(f"{setting}: {shorten(key)!r} is not read here: {error}", where=str(path)) from None
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter type is {shorten(repr(config.get('peft_type')))}; only LoRA is supported", where=str(path)
        )
    used = [name for name in _UNSUPPORTED if config.get(name) not in (None, False, "none", [], {})]
    used += [f"target_parameters of {name}" for name in other_parameters(config)]
    if used:
        raise UserError(f"the adapter uses {', '.join(used)}, which is not supported here", where=str(path))
    start = config.get("init_lora_weights")
    if start not in (*_LEAVE_BASE, *_FOUND_AGAIN):
        raise UserError(
            f"the adapter uses init_lora_weights {start!r}: it subtracted a part of the base's weights, and its "
            "files do not say which part",
            where=str(path),
            fix="Save it with path_initial_model_for_weight_conversion in PEFT, which makes it plain LoRA.",
        )
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            f"{WEIGHTS} is missing" + pickled * "; adapter_model.bin is a pickle, which can run code",
            where=str(folder),
            fix="Save it as safetensors." if pickled else "Check that the folder is complete.",
        )
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors by the names in the model that it was trained on, such as `model.layers.0.mlp.up_proj.lora_A.weight`.

    UserError: not finite.
    """
    path = folder / WEIGHTS
    check_floats(read_header(path)[0], path)
    with foreign_files("the adapter cannot be loaded", path):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        if not bool((tensor.float().abs() <= MOST_VALUE).all()):  # nor is NaN
            what = f"{name} holds values that are not finite" + ", or above 2^38" * bool(tensor.isfinite().all())
            raise UserError(what, where=str(path), fix="Train it again.")
    return tensors


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter's files; a UserError if there is none, a broken one, or one of a kind that is not supported."""
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    transposed, start = bool(config.get("fan_in_fan_out")), config.get("init_lora_weights")
    if start == "olora" and transposed:
        raise UserError("OLoRA on transposed weights (fan_in_fan_out) is not supported", where=str(folder))
    layers: dict[str, LowRank | LowRankStack] = {}
    stacks = take_stacks(tensors, config, lambda name: _rank_and_scaling(config, name), str(folder))
    layers |= {text_name(name): stack for name, stack in stacks.items()}
    for name in sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}):
        a, b = (tensors.pop(f"{name}.lora_{part}.weight", None) for part in "AB")
        magnitude = tensors.pop(f"{name}{_MAGNITUDE}", None) if config.get("use_dora") else None
        if strange := next((other for other in tensors if other.startswith(f"{name}.lora_")), None):
            raise UserError(f"the adapter changes {strange}, which is not supported here", where=str(folder))
        if a is None or b is None or (magnitude is None and config.get("use_dora")):
            missing = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
            raise UserError(f"the adapter is incomplete: {name}.{missing} is missing", where=str(folder))
        if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] > 0:
            raise UserError(f"{name}: {list(a.shape)} and {list(b.shape)} are not a LoRA pair", where=str(folder))
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise UserError(f"{name}: {list(magnitude.shape)} magnitudes for {len(b)} rows", where=str(folder))
        magnitude = None if magnitude is None else magnitude.float()
        scaling = _scaling(config, name, len(a), folder)
        low = LowRank(a.float(), b.float(), scaling, magnitude, start if start in TAKEN else None)
        layers[text_name(f"{name}.weight")] = low
    if not layers and not tensors:
        raise UserError("the adapter changes no layer", where=str(folder), fix="Check that the folder is complete.")
    keeps_tie = bool(config.get("ensure_weight_tying")) or not config.get("modules_to_save")
    return StoredAdapter(
        folder, layers, transposed, {text_name(name): tensor for name, tensor in tensors.items()}, keeps_tie
    )


def _scaling(config: Mapping[str, Any], name: str, r: int, folder: Path) -> float:
    """A layer's scaling; its rank is also that of its tensors, or PEFT could not have read them."""
    rank, scaling = _rank_and_scaling(config, name)
    if rank != r:
        raise UserError(f"{name} has a rank of {r}, but adapter_config.json says {rank}", where=str(folder))
    return scaling


def _rank_and_scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Of a layer, by PEFT's rules."""
    of_all = {setting: config.get(setting) or _DEFAULTS[setting] for setting in _DEFAULTS}
    rank = int(pattern_value(config.get("rank_pattern") or {}, name, of_all["r"]))
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, name, of_all["lora_alpha"]))
    return rank, scaling_of(alpha, rank, rank_stabilised=bool(config.get("use_rslora")))


def load_adapter(model: Any, folder: Path) -> dict[str, LoRALinear | ExpertAdapter]:
    """Put an adapter, written here or by PEFT, on a model; a UserError if it is broken or does not fit."""
    stored = _by_own_names(read_adapter(folder), model)
    layers, experts = linear_layers(model), expert_shapes(model)
    lows = {name.removesuffix(".weight"): low for name, low in stored.layers.items() if isinstance(low, LowRank)}
    stacks = {name: low for name, low in stored.layers.items() if isinstance(low, LowRankStack)}
    _check_layers(model, stored, [*lows, *stacks], {*layers, *experts})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in stored.whole.items():
        _check_shape(name, tensor, tuple(parameters[name].shape), folder)
    adapters = {name: _loaded(name, layers[name], low, folder) for name, low in lows.items()}
    of_experts = {name: _loaded_stack(name, model, experts[name], stack, folder) for name, stack in stacks.items()}
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        replace_layer(model, name, adapter)
    wrap_experts(model, of_experts)
    _load_whole(model, stored)
    return {**adapters, **of_experts}


def _by_own_names(stored: StoredAdapter, model: Any) -> StoredAdapter:
    """The adapter by the names in a model, which has others than one of text alone where it is multimodal."""
    modules = {text_name(name): name for name, _ in model.named_modules()}

    def own(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{modules.get(module, module)}.{last}"

    layers = {own(name): low for name, low in stored.layers.items()}
    return replace(stored, layers=layers, whole={own(name): tensor for name, tensor in stored.whole.items()})


def _check_layers(model: Any, stored: StoredAdapter, names: list[str], layers: Collection[str]) -> None:
    """Whether the model has what the adapter changes."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in names if name not in layers]
    unknown += [name for name in stored.whole if name not in parameters]
    modules = dict(model.named_modules())
    if other := [name for name in unknown if name.split(".base_layer")[0] in modules]:
        raise UserError(
            f"the adapter changes {other[0].split('.base_layer')[0]}, a layer that LoRA is not applied to here",
            where=str(stored.folder),
        )
    if unknown:
        raise UserError(
            f"the adapter belongs to another model: this one has no layer {unknown[0]}",
            where=str(stored.folder),
            fix="Pass the base model that the adapter was trained on.",
        )
    if quantized := [name for name in stored.whole if isinstance(modules[name.rpartition(".")[0]], QuantizedLinear)]:
        raise UserError(
            f"the adapter contains {quantized[0]}, which is quantised in this model",
            where=str(stored.folder),
            fix="Load the base model without quantisation.",
        )


def _loaded(name: str, layer: torch.nn.Module, low: LowRank, folder: Path) -> LoRALinear:
    """A layer wrapped in its adapter, which is one of an unchanged base."""
    out_features, in_features = shape_of(layer)
    _check_shape(f"{name}.lora_A", low.a, (len(low.a), in_features), folder)
    _check_shape(f"{name}.lora_B", low.b, (out_features, len(low.a)), folder)
    if low.start and isinstance(layer, QuantizedLinear):
        raise UserError(
            f"the adapter was initialised from the base's weights (init_lora_weights {low.start}), and this model is "
            "quantised, so that part cannot be computed",
            where=str(folder),
            fix="Load the base model without quantisation.",
        )
    plain = low.on_unchanged_base(dense_weight(layer).detach(), name) if low.start else low
    if plain.magnitude is None:
        return LoRALinear(layer, plain.a, plain.b, plain.scaling)
    _check_shape(f"{name}{_MAGNITUDE}", plain.magnitude, (out_features,), folder)
    return DoRALinear(layer, plain.a, plain.b, plain.scaling, magnitude=plain.magnitude)


def _loaded_stack(
    name: str, model: Any, shape: tuple[int, int, int], stack: LowRankStack, folder: Path
) -> ExpertAdapter:
    count, out_features, in_features = shape
    rank = stack.a.shape[1]
    _check_shape(f"{name}.lora_A", stack.a, (count, rank, in_features), folder)
    _check_shape(f"{name}.lora_B", stack.b, (count, out_features, rank), folder)
    device = device_of(model.get_submodule(name.rpartition(".")[0]))
    return ExpertAdapter(stack.a.to(device), stack.b.to(device), stack.scaling)


@torch.no_grad()
def _load_whole(model: Any, stored: StoredAdapter) -> None:
    """Load what was trained in full.

    Without ensure_weight_tying, PEFT trains a copy of each module of modules_to_save, so that a head and an embedding
    that were one matrix are so no longer.
    """
    if not stored.keeps_tie and is_tied(model) and tied_modules(model, modules_of(stored.whole)):
        untie(model)
    for name, tensor in stored.whole.items():
        model.get_parameter(name).copy_(tensor)


def _check_shape(name: str, tensor: torch.Tensor, wanted: tuple[int, ...], folder: Path) -> None:
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"the adapter does not fit: {name} is {list(tensor.shape)}, not {list(wanted)}",
            where=str(folder),
            fix="Pass the base model that the adapter was trained on.",
        )
