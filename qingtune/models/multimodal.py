"""Multimodal checkpoints, of which the text is trained and answered: what computes that part, and how its tensors are
called in their files and in Transformers' multimodal class. No torch.

A checkpoint of a family named here is loaded as the model of its text alone. What else it holds, such as a vision
tower, is never read, and what is written in its place takes it from the checkpoint bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qingtune.files.weights_file import read_header, weight_files
from qingtune.models.config_file import read_model_config

# Checked (tests/invariant/adapters/test_multimodal.py): their text, computed alone, gives what the whole model gives.
FAMILIES = frozenset({
    "gemma3", "gemma4", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_vl",
})  # fmt: skip
# Text that differs from another architecture in positions alone, which in text count time, height and width alike.
_COMPUTED_BY = {"qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Parts of a multimodal model, and of its files, that are not of its text.
_OUTSIDE = (
    "visual", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio",
    "mtp",
)  # fmt: skip
# Names of modules in them, as PEFT's exclude_modules takes them: they may end as those of the text do.
OUTSIDE_PATTERN = rf"(.*\.)?({'|'.join(_OUTSIDE)})\..*"
# What the multimodal class needs of images, next to its configuration.
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def is_multimodal(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of which the model is only the text."""
    content = read_model_config(folder)
    return content["model_type"] in FAMILIES or isinstance(content.get("text_config"), dict)


def has_multimodal_names(folder: Path) -> bool:
    """Whether the multimodal class of a folder's checkpoint names the parameters of its text as `multimodal_name`."""
    if read_model_config(folder)["model_type"] in FAMILIES:
        return True
    names = (name for path in weight_files(folder) for name in read_header(path)[0])
    return is_multimodal(folder) and any(name.startswith("model.language_model.") for name in names)


def text_name(name: str) -> str:
    """The name that a parameter of a multimodal model's language model, or a module, has in a model of text alone.

    `model.language_model.layers.0.mlp.up_proj` -> `model.layers.0.mlp.up_proj`; likewise of `language_model.model.`,
    as files of older versions of Transformers begin. Other names stay, such as those of Qwen2.5-VL's older files.
    """
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")  # lm_head


def is_text(name: str) -> bool:
    """Whether a tensor of a checkpoint's files is of the model that is loaded, by its own name or its text name."""
    return name.removeprefix("model.").partition(".")[0] not in _OUTSIDE


def multimodal_name(name: str) -> str:
    """The name that a parameter of a model of text, or a module, has in Transformers' multimodal model."""
    if name.startswith("model.") and not name.startswith("model.language_model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def text_config(whole: Any, content: Mapping[str, Any]) -> Any:
    """The configuration of the text part alone, of an architecture that Transformers has as a model of its own.

    Args:
        whole: the checkpoint's, as Transformers holds it.
        content: of its config.json.
    """
    from transformers import CONFIG_MAPPING

    text = whole.get_text_config(decoder=True)
    # What the class takes for granted (Mistral 3: tied) need not be so of the checkpoint.
    text.tie_word_embeddings = whole.tie_word_embeddings and (
        "tie_word_embeddings" in content or getattr(text, "tie_word_embeddings", False)
    )
    text.dtype = whole.dtype or text.dtype
    if kind := _COMPUTED_BY.get(text.model_type):
        values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
        text = CONFIG_MAPPING[kind](**values)
    return text
