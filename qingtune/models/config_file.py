"""What a model folder's own settings say, config.json and generation_config.json: checked, and without what would let
a stranger's file choose the code that runs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qingtune.config.types import LEAST_PENALTY, MOST_PENALTY, MOST_TEMPERATURE
from qingtune.errors import UserError
from qingtune.files.json_files import (
    FLAG,
    NAME,
    OBJECT,
    Kind,
    check_fields,
    either,
    list_of,
    number,
    read_object,
    read_object_if_there,
    whole,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Settings by which Transformers would fetch or choose code or other files, or give its answers another form. The
# attention is always chosen here. Names that begin with _ are Transformers' own notes, and are left out as well.
_LEFT_OUT = {
    "attn_implementation", "experts_implementation", "configuration_files", "distributed_config", "fusion_config",
    "kernel_config", "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "transformers_weights", "use_kernels", "use_return_dict",
}  # fmt: skip

# What no model comes near to; beyond it a file is broken, and what is made of it would take all memory.
MOST_LAYERS, LARGEST_SIZE, MOST_POSITIONS = 10_000, 2**24, 2**24
_SIZE = either(whole(1, LARGEST_SIZE), list_of(whole(0, LARGEST_SIZE)))  # some architectures give one for each layer
_POSITIONS, _SHARE, _ID = whole(1, MOST_POSITIONS), number(0, 1), whole(-1, LARGEST_SIZE)
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("model_type", "dtype", "torch_dtype", "hidden_act"), NAME),
    "tie_word_embeddings": FLAG,
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "n_layer": whole(1, MOST_LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "vocab_size"), whole(1, LARGEST_SIZE)),
    **dict.fromkeys(
        ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_inner"), _SIZE
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _POSITIONS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), either(_ID, list_of(_ID))),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"), _SHARE),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"), _SHARE),
    "initializer_range": number(0),
    "rope_theta": number(above=0),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "layer_types": list_of(NAME),
    "quantization_config": OBJECT,
    "text_config": OBJECT,
}
SAMPLING: dict[str, Kind] = {
    "temperature": number(0, MOST_TEMPERATURE),
    "top_p": number(above=0, most=1),
    "top_k": whole(0, LARGEST_SIZE),
    "min_p": number(0, 1),
    "repetition_penalty": number(LEAST_PENALTY, MOST_PENALTY),
}


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json without what would choose code; a UserError if it is missing, broken or next to an adapter."""
    path = folder / CONFIG
    adapter = (folder / "adapter_config.json").exists()
    try:
        content = read_object(path)
    except FileNotFoundError:
        what, fix = "no config.json here: this is not a model folder", "Check the path."
        if adapter:
            what = "this folder holds an adapter, not a model"
            fix = "Pass its base model here and the adapter as --lora_model."
        elif files := sorted(folder.glob("*.gguf")):
            what, fix = "no config.json here", f"Pass a .gguf file, such as {files[0]}."
        raise UserError(what, where=str(folder), fix=fix) from None
    if adapter:
        raise UserError(
            "this folder holds a model and an adapter (adapter_config.json), so it is not clear which is meant",
            where=str(folder),
            fix="Move one of them to another folder.",
        )
    check_config(content, str(path))
    return _without_choices(content)


def check_config(content: dict[str, Any], where: str) -> None:
    """Raise a UserError unless sizes and choices are of their kinds, and no larger than any model's."""
    check_fields(content, _KINDS, where)
    for name, value in content.items():
        _check_finite(name, value, where)
    for name in ("dtype", "torch_dtype"):
        if content.get(name) not in (None, *DTYPES):
            raise UserError(
                f'"{name}" is {content[name]!r}, which is not a supported dtype',
                where=where,
                fix=f"{', '.join(DTYPES)}.",
            )
    if isinstance(content.get("text_config"), dict):
        check_config(content["text_config"], f"{where}, text_config")


def _check_finite(name: str, value: Any, where: str) -> None:
    """An infinite number means "no limit" in lists only."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'"{name}" is {value}, where a finite number is expected', where=where)
    if name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
        for inner, one in cast("dict[str, Any]", value).items():
            _check_finite(f"{name}.{inner}", one, where)


def _without_choices(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_choices(one) for one in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_choices(inner)
        for name, inner in cast("dict[str, Any]", value).items()
        if not name.startswith("_") and name not in _LEFT_OUT
    }


def context_length(folder: Path) -> int | None:
    """The longest sequence the model knows positions for, in tokens; None if its configuration does not say."""
    size = _setting(read_model_config(folder), "max_position_embeddings", "n_positions")
    return size if isinstance(size, int) else None


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by a config.json; None if it does not say."""
    size = _setting(config, "vocab_size")
    return size if isinstance(size, int) else None


def parts_of_config(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config.json and, where it has one, what it says of the text."""
    text = content.get("text_config")
    return [content, cast("Mapping[str, Any]", text)] if isinstance(text, dict) else [content]


def _setting(config: Mapping[str, Any], *names: str) -> Any:
    """The first of these that a config.json has for the whole model or for its text; None if it has none."""
    values = (part.get(name) for part in parts_of_config(config) for name in names)
    return next((value for value in values if value is not None), None)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, empty where there is none; a UserError if it is broken or asks for what cannot be."""
    path = folder / GENERATION
    content = read_object_if_there(path) or {}
    ids = either(whole(0, LARGEST_SIZE), list_of(whole(0, LARGEST_SIZE)))
    check_fields(content, {**SAMPLING, "eos_token_id": ids, "do_sample": FLAG}, str(path))
    return content


def stop_ids(folder: Path) -> list[int]:
    """The ids at which the model's own configuration stops generating; a UserError if the model lacks one of them.

    Of a multimodal model those of its text, where it names none for the whole.
    """
    config = read_model_config(folder)
    size = vocabulary_size(config)
    found: list[int] = []
    of_generation = read_generation_config(folder).get("eos_token_id")
    for name, value in ((GENERATION, of_generation), (CONFIG, _setting(config, "eos_token_id"))):
        ids: list[int] = value if isinstance(value, list) else [] if value is None else [value]
        if outside := [one for one in ids if one < 0 or (size is not None and one >= size)]:
            raise UserError(
                f'"eos_token_id" is {outside[0]}, but the model has the tokens 0 to {size and size - 1}',
                where=str(folder / name),
            )
        found += ids
    return sorted(set(found))
