"""The architectures that can be exported, as data: what llama.cpp calls them, which tensors and settings it reads, and
what it would compute otherwise.

The facts are those of llama.cpp's loaders (src/models/*.cpp), and of gguf's tables of names where these agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gguf.constants import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES

Value = str | bool | int | float | list[str] | list[int] | list[float]

_QKV = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})
_WINDOWED = ("mistral", "ministral", "ministral3", "phi3")
# By which llama.cpp knows the largest Gemma of each kind, the scores of which are scaled by hidden_size / heads.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        name: llama.cpp's.
        biases: that it loads; it would leave any other out silently.
        activation: of the MLP.
        interleaved: whether it turns neighbouring rows of a head against each other, where Transformers turns halves.
        offset_norms: whether the model multiplies by 1 + w in its norms, of which the file holds the sum.
        partial_rotary: whether it can turn a part of each head only.
        reads_yarn: whether it reads all settings of YaRN; the others have fixed ones but for the factors.
        absent: tensors of a layer in gguf's table that these models do not have.
        settings: further settings, without the architecture's name in front.
        problem: what llama.cpp would pass over, computing something else; None if nothing.
    """

    name: str
    biases: frozenset[str] = frozenset()
    activation: str = "silu"
    interleaved: bool = False
    offset_norms: bool = False
    partial_rotary: bool = False
    reads_yarn: bool = False
    absent: frozenset[MODEL_TENSOR] = frozenset()
    settings: Callable[[Any], Mapping[str, Value]] = lambda _: {}
    problem: Callable[[Any], str | None] = lambda _: None

    @property
    def arch(self) -> MODEL_ARCH:
        """Of gguf's tables."""
        return MODEL_ARCH[self.name.upper()]

    def weights_of_layer(self, config: Any, layer: int) -> list[str]:
        """What llama.cpp needs of a layer, such as attn_q.weight, in order."""
        tensors = [tensor for tensor in MODEL_TENSORS[self.arch] if tensor not in self.absent]
        kinds = getattr(config, "layer_types", None)
        if kinds and "linear_attention" in kinds:
            other = _FULL_ATTENTION if kinds[layer] == "linear_attention" else _LINEAR_ATTENTION
            tensors = [tensor for tensor in tensors if tensor not in other]
        names = [TENSOR_NAMES[tensor] for tensor in tensors]
        layers = [name.removeprefix("blk.{bid}.") for name in names if name.startswith("blk.")]
        return sorted(name + _SUFFIXES.get(name, ".weight") for name in layers)


_SUFFIXES = {"ssm_a": "", "ssm_dt": ".bias"}  # of tensors that are no weights
_FULL_ATTENTION = frozenset({
    MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V, MODEL_TENSOR.ATTN_OUT, MODEL_TENSOR.ATTN_Q_NORM,
    MODEL_TENSOR.ATTN_K_NORM,
})  # fmt: skip
_LINEAR_ATTENTION = frozenset({
    MODEL_TENSOR.ATTN_QKV, MODEL_TENSOR.ATTN_GATE, MODEL_TENSOR.SSM_A, MODEL_TENSOR.SSM_CONV1D, MODEL_TENSOR.SSM_DT,
    MODEL_TENSOR.SSM_NORM, MODEL_TENSOR.SSM_BETA, MODEL_TENSOR.SSM_ALPHA, MODEL_TENSOR.SSM_OUT,
})  # fmt: skip
_EXPERTS = frozenset({
    MODEL_TENSOR.ATTN_ROT_EMBD, MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_DOWN_EXP,
    MODEL_TENSOR.FFN_UP_EXP,
})  # fmt: skip


def head_dim_of(config: Any) -> int:
    """Numbers of an attention head."""
    own = getattr(config, "head_dim", None)  # Qwen2's configuration has no such setting
    return own or config.hidden_size // config.num_attention_heads


def window_of(config: Any) -> int | None:
    """How many tokens a layer sees, where that is fewer than the model reads and llama.cpp has no windows for it."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "ministral" and "sliding_attention" not in config.layer_types:
        window = None
    if config.model_type not in _WINDOWED or not window or window >= config.max_position_embeddings:
        return None
    return int(window)


# --- Settings and problems -------------------------------------------------------------------------------------------


def _no_windows(config: Any) -> str | None:
    layers: Sequence[str] = getattr(config, "layer_types", None) or []
    if any(layer != "full_attention" for layer in layers):
        return "some of its layers use a sliding window (use_sliding_window)"
    return None


def _qwen2_problem(config: Any) -> str | None:
    if head_dim_of(config) * config.num_attention_heads != config.hidden_size:
        return "heads x head size is not hidden_size"
    return _no_windows(config)


def _experts(config: Any) -> dict[str, Value]:
    return {
        "expert_count": int(config.num_experts),
        "expert_used_count": int(config.num_experts_per_tok),
        "expert_feed_forward_length": int(config.moe_intermediate_size),
    }


def _qwen3_moe_problem(config: Any) -> str | None:
    if not config.norm_topk_prob:
        return "norm_topk_prob is false: the weights of the chosen experts do not sum to 1"
    return _no_windows(config)


def _period(config: Any) -> int | None:
    """n, where every n-th layer and no other has full attention; None where there is no such n."""
    kinds: list[str] = list(config.layer_types)
    if "full_attention" not in kinds:
        return len(kinds) + 1
    n = kinds.index("full_attention") + 1
    return n if all((kind == "full_attention") == ((i + 1) % n == 0) for i, kind in enumerate(kinds)) else None


def _gemma3_settings(config: Any) -> dict[str, Value]:
    settings: dict[str, Value] = {
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": _period(config) or 0,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    }
    if config.final_logit_softcapping is not None:
        settings["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return settings


def _gemma_problem(config: Any) -> str | None:
    large = config.num_hidden_layers == _GEMMA_27B_LAYERS[config.model_type]
    scale = config.hidden_size // config.num_attention_heads if large else head_dim_of(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale}"
    ahead = "its attention looks ahead (use_bidirectional_attention)"
    return ahead if config.use_bidirectional_attention else None


def _gemma2_settings(config: Any) -> dict[str, Value]:
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma2_problem(config: Any) -> str | None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            return f"{name} is not set"
    if not config.tie_word_embeddings:
        return "its head is not its embedding (tie_word_embeddings)"
    if _period(config) != 2:
        return "its layers do not alternate between a sliding window and full attention"
    return _gemma_problem(config)


def _gemma3_problem(config: Any) -> str | None:
    if config.attn_logit_softcapping is not None:
        return "attn_logit_softcapping is set"
    if problem := _gemma_problem(config):
        return problem
    if config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        return "positions of its layers with a sliding window are scaled"
    return "its layers with full attention do not follow at equal distances" if _period(config) is None else None


def _sections(config: Any) -> list[int]:
    """How the frequencies are divided among time, height and width, which for text are the same; the default is that of
    Transformers."""
    return list(config.rope_parameters.get("mrope_section", [11, 11, 10]))


def _qwen35_settings(config: Any) -> dict[str, Value]:
    return {
        "rope.dimension_sections": [*_sections(config), 0],
        "full_attention_interval": _period(config) or 0,
        "ssm.conv_kernel": int(config.linear_conv_kernel_dim),
        "ssm.state_size": int(config.linear_key_head_dim),
        "ssm.group_count": int(config.linear_num_key_heads),
        "ssm.time_step_rank": int(config.linear_num_value_heads),
        "ssm.inner_size": int(config.linear_value_head_dim * config.linear_num_value_heads),
    }


def _qwen35_moe_settings(config: Any) -> dict[str, Value]:
    shared = int(config.shared_expert_intermediate_size)
    return {**_qwen35_settings(config), **_experts(config), "expert_shared_feed_forward_length": shared}


def _ministral3_settings(config: Any) -> dict[str, Value]:
    """How queries grow with the position: by 1 + beta ln(1 + floor(position / original context length))."""
    rope = config.rope_parameters
    if not (beta := float(rope["llama_4_scaling_beta"])):
        return {}
    original = int(rope["original_max_position_embeddings"])
    return {"rope.scaling.original_context_length": original, "attention.temperature_scale": beta}


def _qwen35_problem(config: Any) -> str | None:
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return "keys and values of its linear attention differ in size"
    if sum(_sections(config)) > head_dim_of(config):
        return f"mrope_section {_sections(config)} is longer than a head of {head_dim_of(config)}"
    return "its layers with full attention do not follow at equal distances" if _period(config) is None else None


_LLAMA = Architecture(
    "llama",
    _QKV | {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"},
    interleaved=True,
    absent=_EXPERTS,
    problem=_no_windows,
)
_QWEN35 = Architecture(
    "qwen35", offset_norms=True, partial_rotary=True, settings=_qwen35_settings, problem=_qwen35_problem
)
# By model_type of Transformers.
ARCHITECTURES = {
    "qwen2": Architecture("qwen2", _QKV, absent=_EXPERTS, problem=_qwen2_problem),
    "qwen3": Architecture("qwen3", _QKV, absent=_EXPERTS, problem=_no_windows),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": replace(_LLAMA, problem=lambda _: None),
    "ministral3": Architecture(
        "mistral3", interleaved=True, reads_yarn=True, absent=_EXPERTS, settings=_ministral3_settings
    ),
    "qwen3_moe": Architecture("qwen3moe", settings=_experts, problem=_qwen3_moe_problem),
    "phi3": Architecture(
        "phi3",
        partial_rotary=True,
        absent=frozenset({MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V}),
    ),
    "gemma2": Architecture(
        "gemma2",
        activation="gelu_pytorch_tanh",
        offset_norms=True,
        settings=_gemma2_settings,
        problem=_gemma2_problem,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        activation="gelu_pytorch_tanh",
        offset_norms=True,
        settings=_gemma3_settings,
        problem=_gemma3_problem,
    ),
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": replace(
        _QWEN35, name="qwen35moe", absent=frozenset({MODEL_TENSOR.FFN_GATE_UP_EXP}), settings=_qwen35_moe_settings
    ),
}
