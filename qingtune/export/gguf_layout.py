"""How a model of Transformers' layout lies in a GGUF file: names, order of rows, and the settings llama.cpp reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from qingtune.errors import UserError
from qingtune.models.config_file import read_model_config
from qingtune.models.load import config_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tensors of a layer in gguf's tables that dense models do not have.
_NOT_IN_DENSE = (MODEL_TENSOR.ATTN_ROT_EMBD, MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.FFN_GATE_EXP,
                 MODEL_TENSOR.FFN_DOWN_EXP, MODEL_TENSOR.FFN_UP_EXP)  # fmt: skip
_QKV_BIASES = {"attn_q.bias", "attn_k.bias", "attn_v.bias"}
# model_type of Transformers, and by the same name architecture of llama.cpp -> biases that llama.cpp loads; it would
# leave any other out silently. The names agree; what lies behind them differs in places.
_BIASES = {
    "qwen2": _QKV_BIASES,
    "qwen3": _QKV_BIASES,
    "llama": _QKV_BIASES | {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"},
}

Value = str | bool | int | float | list[str] | list[int]


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the file to be.

    Attributes:
        name: in the GGUF file.
        source: in the model's folder.
        shape: as in the folder; GGUF counts dimensions the other way round.
        interleaved_heads: heads whose rows are put in another order; 0 for none.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it lies in the file.

        Transformers turns the halves of a head against each other, llama.cpp's `llama` neighbouring rows.
        """
        if not self.interleaved_heads:
            return tensor
        halves = tensor.reshape(self.interleaved_heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class GGUFLayout:
    """A model in GGUF, without its tokenizer.

    Attributes:
        architecture: llama.cpp's name.
        metadata: the settings, in order.
        tensors: those that come from the folder, in order.
        constants: further tensors, fp32.
        embeddings: rows of the embedding, which the vocabulary must fill.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: list[PlacedTensor]
    embeddings: int
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def layout_of(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, untie: bool = False) -> GGUFLayout:
    """How a model lies in GGUF.

    Args:
        folder: of the model.
        shapes: of its stored tensors, by name.
        untie: the head is a separate matrix here, though the model's configuration has it tied.

    Raises:
        UserError: the architecture, or something about this model, cannot be expressed.
    """
    kind = read_model_config(folder)["model_type"]
    if kind not in _BIASES:
        raise UserError(
            f'the architecture "{kind}" cannot be exported', where=str(folder), fix=f"{', '.join(_BIASES)} can."
        )
    config: Any = config_of(folder)
    if problem := _inexpressible(config, kind):
        raise UserError(f"llama.cpp's {kind} cannot represent this model: {problem}", where=str(folder))
    head_dim = _head_dim(config)
    metadata: dict[str, Value] = {
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.key_length": head_dim,
        f"{kind}.attention.value_length": head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{kind}.vocab_size": config.vocab_size,
        f"{kind}.rope.dimension_count": head_dim,
        f"{kind}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    constants: dict[str, NDArray[np.float32]] = {}
    _add_rope_scaling(config, kind, folder, metadata, constants)
    config.tie_word_embeddings = config.tie_word_embeddings and not untie
    tensors = _place(config, kind, folder, shapes)
    embeddings = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    return GGUFLayout(kind, metadata, tensors, embeddings, constants)


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)  # Qwen2's configuration has no such setting
    return own or config.hidden_size // config.num_attention_heads


def _inexpressible(config: Any, kind: str) -> str | None:
    """What llama.cpp would pass over, computing something else."""
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    layers = getattr(config, "layer_types", None) or []
    if any(layer != "full_attention" for layer in layers):
        return "some of its layers use a sliding window (use_sliding_window)"
    if kind == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "heads x head size is not hidden_size"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "RoPE covers only a part of each head (partial_rotary_factor)"
    return None


# --- Tensors ---------------------------------------------------------------------------------------------------------


def _place(config: Any, kind: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[PlacedTensor]:
    """Every stored tensor at its place; a UserError if one has none, or one is missing."""
    tied = bool(config.tie_word_embeddings)
    if not tied and "lm_head.weight" not in shapes:
        raise UserError("the head (lm_head.weight) is missing", where=str(folder), fix="Download the model again.")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if kind == "llama" else {}
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    layers = [f"blk.{layer}." for layer in range(config.num_hidden_layers)]
    wanted = [layer + part for layer in layers for part in _weights_of_layer(kind)]
    wanted = ["token_embd.weight", "output_norm.weight", *wanted]
    known = {*wanted, "output.weight", *(layer + bias for layer in layers for bias in _BIASES[kind])}
    placed: dict[str, PlacedTensor] = {}
    for source, shape in shapes.items():
        if source == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embedding where there is no head
        if source.endswith("rotary_emb.inv_freq"):
            continue  # old folders hold this; it follows from the settings
        name = names.get_name(source, (".weight", ".bias")) or ""
        # gguf's map also has the names of other libraries, which may arrange tensors in another way.
        if not source.startswith(("model.", "lm_head.")) or name not in known or name in placed:
            raise UserError(f"{source} has no place in llama.cpp's {kind}", where=str(folder))
        placed[name] = PlacedTensor(name, source, shape, heads.get(name.rpartition(".")[0].rpartition(".")[2], 0))
    if missing := [name for name in wanted if name not in placed]:
        raise UserError(
            f"{len(missing)} weights are missing, for example {missing[0]}", where=str(folder), fix="Download it again."
        )
    return sorted(placed.values(), key=lambda tensor: _order(tensor.name))


def _weights_of_layer(kind: str) -> list[str]:
    """What llama.cpp needs of each layer, such as attn_q.weight, in order."""
    tensors = MODEL_TENSORS[MODEL_ARCH[kind.upper()]]
    names = [TENSOR_NAMES[tensor] for tensor in tensors if tensor not in _NOT_IN_DENSE]
    return sorted(f"{name.removeprefix('blk.{bid}.')}.weight" for name in names if name.startswith("blk."))


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, head, layers by number, as llama.cpp's own files have them."""
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)


# --- Rotary positions ------------------------------------------------------------------------------------------------


def _add_rope_scaling(
    config: Any, kind: str, folder: Path, metadata: dict[str, Value], constants: dict[str, NDArray[np.float32]]
) -> None:
    """Add what stretches the positions beyond those of pretraining; a UserError if llama.cpp cannot here."""
    rope = config.rope_parameters
    scaling = rope.get("rope_type", "default")
    unlike = _unlike_llama_cpp(rope) if scaling == "yarn" else []
    if scaling in ("linear", "yarn") and not unlike:
        metadata |= {f"{kind}.rope.scaling.type": scaling, f"{kind}.rope.scaling.factor": float(rope["factor"])}
        if scaling == "yarn":
            original = int(rope["original_max_position_embeddings"])
            metadata[f"{kind}.rope.scaling.original_context_length"] = original
    elif scaling == "llama3" and kind == "llama":
        constants["rope_freqs.weight"] = _llama3_factors(config)
    elif scaling != "default":
        detail = f" with {', '.join(unlike)}" if unlike else ""
        raise UserError(
            f"llama.cpp's {kind} cannot represent this model: its rope_type {scaling}{detail}",
            where=str(folder / "config.json"),
            fix="default, linear, yarn and, for llama, llama3 can be exported.",
        )


def _unlike_llama_cpp(rope: Mapping[str, Any]) -> Sequence[str]:
    """Settings of YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071) that are not llama.cpp's fixed ones."""
    factor = float(rope["factor"])
    usual = {
        "attention_factor": 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "mscale": None,
        "mscale_all_dim": None,
    }
    return [
        f"{name} {rope[name]}"
        for name, value in usual.items()
        if rope.get(name) is not None and (value is None or not math.isclose(rope[name], value, rel_tol=1e-6))
    ]


def _llama3_factors(config: Any) -> NDArray[np.float32]:
    """By what llama.cpp divides each of a head's frequencies, fp32 [head_dim / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = _head_dim(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled.double()).float().numpy()
