"""Source -> tokenizer and model, in the right dtype on the right device, quantised layer by layer if asked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qingtune.data.tokenize import Template, make_template
from qingtune.data.tokenizer_calls import panics_as_errors
from qingtune.data.tokenizer_limits import UnsafeTokenizer, check_loaded, check_tokenizer_files
from qingtune.errors import UserError
from qingtune.files.foreign import foreign_files
from qingtune.files.weights_file import check_floats, read_weights_header
from qingtune.models.config_file import (
    CONFIG,
    parts_of_config,
    read_generation_config,
    read_model_config,
    vocabulary_size,
)
from qingtune.models.config_file import stop_ids as stop_ids  # with the tokenizer, what says how answers end
from qingtune.models.find import ModelSource, converted_folder, stored_in_4bit, stored_numbers
from qingtune.models.gguf_convert import convert_gguf
from qingtune.models.layers import stored_tensors
from qingtune.models.multimodal import FAMILIES, text_config, text_name
from qingtune.models.stored_weights import StoredWeights
from qingtune.output.console import say
from qingtune.output.quiet import quieten_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SIZES_OF_LAYERS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
IN_4BIT = (
    "The model's linear layers are stored in 4 bits (NF4): use_qlora trains on them as they are; elsewhere they are "
    "unpacked while they are read."
)


def local_folder(source: ModelSource, cache_dir: str | None) -> Path:
    """The folder with the model's safetensors; a .gguf file is converted once and kept by its hash.

    Raises:
        UserError: the model's architecture is unknown, or its code would have to be run.
    """
    if not source.is_gguf:
        check_architecture(read_model_config(source.path), str(source.path))
        _check_weights(source.path)
        if stored_in_4bit(source.path):
            say(IN_4BIT)
        return source.path
    folder = converted_folder(source.path, cache_dir)
    if not (folder / "config.json").exists():
        say(f"Converting {source.path.name} to safetensors, once (half a minute or so) ...")
        convert_gguf(source.path, folder)
    return folder


def check_architecture(content: Mapping[str, Any], where: str) -> None:
    """Raise a UserError unless Transformers itself has the causal language model that a config.json describes."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = content.get("model_type")
    if kind is None:
        raise UserError("config.json names no model_type", where=where)
    if kind in FAMILIES:
        return
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "")
    if kind in CONFIG_MAPPING:
        _refuse_more_than_text(kind, built, where)
    if kind in CONFIG_MAPPING and built:
        return
    if "auto_map" in content:
        raise UserError(
            f"this model ({kind}) needs its own code (auto_map), which is never run, because it could do anything",
            where=where,
            fix="Use a model whose architecture is part of Transformers.",
        )
    reason = "has no causal language model in" if kind in CONFIG_MAPPING else "is not known to"
    raise UserError(f'the architecture "{kind}" {reason} the installed Transformers', where=where)


def _refuse_more_than_text(kind: str, built: str, where: str) -> None:
    """Refuse a multimodal model that Transformers builds whole, as adapters would reach its towers, or not at all.

    built: the class that it would be; empty for none.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    parts: Any = CONFIG_MAPPING[kind].sub_configs
    whole = built.endswith("ForConditionalGeneration")
    if "text_config" in parts and (whole or (not built and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)):
        raise UserError(
            f'the architecture "{kind}" is multimodal, and its text cannot be loaded alone',
            where=where,
            fix=f"That of {', '.join(sorted(FAMILIES))} can.",
        )


def _check_weights(folder: Path) -> None:
    """Refuse weights that are broken, in another form than numbers, or fewer than a model of this configuration has."""
    tensors, config = read_weights_header(folder), read_model_config(folder)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    if layers > len(tensors):
        raise UserError(
            f"{CONFIG} says {layers:,} layers, but the files contain {len(tensors):,} weights", where=str(folder)
        )
    if not stored_in_4bit(folder):
        check_floats(tensors, folder)
    read_generation_config(folder)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder; a UserError if it holds none that works without running its code."""
    import transformers

    quieten_transformers()
    folder = Path(folder)
    config = _whole_config(read_model_config(folder), folder / CONFIG) if (folder / CONFIG).exists() else None
    try:
        with (
            foreign_files("no tokenizer can be loaded", folder, "Check that the folder is complete."),
            panics_as_errors(),
        ):
            check_tokenizer_files(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
            check_loaded(tokenizer, folder)
    except UnsafeTokenizer as error:
        raise UserError(
            f"the tokenizer is refused: {error}", where=str(folder), fix="Use a model from a source you trust."
        ) from None
    return tokenizer


def load_template(base: Path, adapter: Path | None = None, stops: Sequence[int] | None = None) -> Template:
    """The tokenizer and chat template of a model; those of the adapter, if it brings its own.

    Args:
        stops: ids that end an answer; None for those of the model's own configuration.

    Raises:
        UserError: they are missing, or cannot be used with the model.
    """
    own = adapter is not None and (adapter / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(adapter if own and adapter else base)
    rows = vocabulary_size(read_model_config(base))
    return make_template(tokenizer, stop_ids(base) if stops is None else stops, rows)


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU in a dtype; weights come from safetensors only, and no code of the model's is run.

    Raises:
        UserError: the weights do not fit the configuration.
    """
    import transformers

    quieten_transformers()
    if stored_in_4bit(folder) or read_model_config(folder)["model_type"] in FAMILIES:
        return _load_by_text_names(folder, dtype)
    if (mixture := _load_joined(folder, dtype)) is not None:
        return mixture
    config = config_of(folder)
    _check_fit(config, folder)
    with foreign_files("the model cannot be loaded", folder):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if missing := sorted(cast("list[str]", info["missing_keys"])):
        raise UserError(
            f"{len(missing)} weights are missing, for example {missing[0]}", where=str(folder), fix="Download it again."
        )
    _check_shapes(sorted(cast("list[tuple[str, Any, Any]]", info["mismatched_keys"])), folder)
    return model


def _check_shapes(wrong: list[tuple[str, Any, Any]], folder: Path) -> None:
    """Report weights of other shapes than they should have: name, stored shape, that of the configuration."""
    if wrong:
        name, stored, wanted = wrong[0]
        raise UserError(
            f"{len(wrong)} weights have another shape than {CONFIG} says, for example {name}: "
            f"{list(stored)}, not {list(wanted)}",
            where=str(folder),
        )


def _load_joined(folder: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """A mixture whose files hold each expert's matrices apart, read one at a time; None for any other model.

    Transformers would hold the pages of all files until the last matrix is joined: the model would be there twice.
    """
    stored = StoredWeights(folder)
    if not any(".experts.0." in name for name in stored.shapes):
        return None
    model = empty_model(folder, dtype)
    stored.join_experts(model)
    if not stored.fit(model):
        return None
    for name, tensor in stored_tensors(model).items():
        tensor.data.copy_(stored.read(name))
    return model


def _load_by_text_names(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model filled tensor by tensor: the text of a multimodal one, or one whose linear layers are stored in 4 bits.

    Transformers would load the former with all that is not text, or not at all, and of the latter layers of
    bitsandbytes', which on some CPUs repack their weights in place.
    """
    model, stored = empty_model(folder, dtype), StoredWeights(folder)
    stored.join_experts(model)
    for name, tensor in stored_tensors(model).items():
        if stored.shapes.get(text_name(name)) != tuple(tensor.shape):
            raise UserError(
                f"{name} does not have the name and shape that its architecture expects",
                where=str(folder),
                fix="Use the model in 16 bits." if stored.packed else "Download it again.",
            )
        tensor.data.copy_(stored.read(name))
    return model


def empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU with weights of no value, for which memory is reserved but not yet taken."""
    config = config_of(folder)
    _check_fit(config, folder)
    return _build(config, dtype, folder / CONFIG)


def model_on_meta(config: PretrainedConfig, dtype: torch.dtype | None, where: Path) -> PreTrainedModel:
    """The model on the meta device: modules and shapes, no memory for numbers; a UserError if Transformers refuses it.

    dtype: of its parameters, None for that of the configuration; where: the configuration's file, for messages.
    """
    with torch.device("meta"):
        return _build(config, dtype, where)


def _build(config: PretrainedConfig, dtype: torch.dtype | None, where: Path) -> PreTrainedModel:
    import transformers
    from transformers.initialization import no_init_weights

    quieten_transformers()
    with foreign_files("no model can be created from its configuration", where), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_attention(config), trust_remote_code=False
        )
        model.tie_weights()
    return model.eval()


def config_of(folder: Path) -> PretrainedConfig:
    """The configuration as Transformers holds it, of what `read_model_config` lets through, of a multimodal checkpoint
    that of the text alone; a UserError if refused."""
    content = read_model_config(folder)
    config = make_config(content, folder / CONFIG)
    if content["model_type"] in FAMILIES and config.tie_word_embeddings:
        of_text = parts_of_config(content)[-1].get("tie_word_embeddings")
        # Transformers writes that a head is tied where a class takes it for granted, and stores it all the same.
        heads = [name for name in read_weights_header(folder) if text_name(name) == "lm_head.weight"]
        config.tie_word_embeddings = bool(of_text) or not heads
    config.name_or_path = str(folder)
    return config


def make_config(content: Mapping[str, Any], where: Path) -> PretrainedConfig:
    """The configuration that a checked config.json, `where`, describes, of a multimodal checkpoint that of the text
    alone; a UserError if Transformers refuses it."""
    config = _whole_config(content, where)
    if content.get("model_type") in FAMILIES:
        config = cast("PretrainedConfig", text_config(config, content))
    elif getattr(config, "tie_word_embeddings", False):  # lost where Transformers builds the model of text alone
        cast("Any", config).get_text_config(decoder=True).tie_word_embeddings = True
    _check_layer_types(config, where)
    return config


def _whole_config(content: Mapping[str, Any], where: Path) -> PretrainedConfig:
    import transformers

    # What is made here is of Transformers' own code, and not quantised.
    kept = {name: value for name, value in content.items() if name not in ("auto_map", "quantization_config")}
    with tempfile.TemporaryDirectory() as clean, foreign_files("this configuration cannot be used", where):
        (Path(clean) / CONFIG).write_text(json.dumps(kept), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(clean, trust_remote_code=False)


def _check_layer_types(config: PretrainedConfig, where: Path) -> None:
    """Refuse layers of a kind whose size is missing: Transformers would fail at the first tokens."""
    text: Any = config.get_text_config(decoder=True)
    for kind, size in _SIZES_OF_LAYERS.items():
        if kind in (getattr(text, "layer_types", None) or ()) and getattr(text, size, None) is None:
            raise UserError(f'"layer_types" names {kind}, and "{size}" is not set or switched off', where=str(where))


def _attention(config: PretrainedConfig) -> str:
    """The attention to build a model with, as Transformers would choose; never left to the model's files."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    built: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if built._supports_sdpa else "eager"


def _check_fit(config: PretrainedConfig, folder: Path) -> None:
    """Refuse a configuration whose model would have other weights than are stored, before memory is taken for them."""
    wanted = dict(model_on_meta(config, None, folder / CONFIG).named_parameters())
    if not stored_in_4bit(folder):
        stored = {text_name(name): tensor for name, tensor in read_weights_header(folder).items()}
        found = ((name, stored[name].shape, weight.shape) for name, weight in wanted.items() if name in stored)
        _check_shapes([(name, has, wants) for name, has, wants in found if has != tuple(wants)], folder)
    described, numbers = sum(weight.numel() for weight in wanted.values()), stored_numbers(folder)
    if described > 2 * numbers:  # weights that are missing are named when the others are read
        raise UserError(
            f"{CONFIG} describes a model of {described:,} parameters, but the files contain {numbers:,}",
            where=str(folder),
            fix="Check that the download is complete.",
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which the model's weights are kept on disk."""
    said = (part.get(name) for part in parts_of_config(read_model_config(folder)) for name in ("dtype", "torch_dtype"))
    return getattr(torch, next(filter(None, said), "float32"))


def dtype_of_all(folder: Path) -> torch.dtype:
    """The dtype in which all of the model's weights are kept on disk; fp32, which holds any, where they differ."""
    kinds = {tensor.dtype for tensor in read_weights_header(folder).values()}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get("".join(kinds), torch.float32)


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a model as a folder of Transformers' layout, its weights in a dtype; the model is left in it."""
    cast("Any", model).set_attn_implementation(_attention(model.config))  # ours is no name that others know
    cast("Any", model).to(dtype).save_pretrained(folder)
