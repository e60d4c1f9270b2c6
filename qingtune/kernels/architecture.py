"""A decoder as data: each layer a mixer of tokens (attention or a gated delta net) and an MLP (dense or of experts),
with the switches that set one family of models apart from another.

Read from the configuration alone, so that training, answering, the memory plan and the export ask in one place. Shapes
of weights and the names of their modules follow from the switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]
ALL = "all"  # the name of the rotary table where layers share one

# Architectures checked (tests/invariant) to give here what Transformers gives, and what a head's rows are called by.
MODEL_TYPES = frozenset({
    "qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "ministral", "ministral3", "gemma2", "gemma3_text", "phi3",
    "qwen3_5_text", "qwen3_5_moe_text",
})  # fmt: skip
_WINDOW_EVERYWHERE = frozenset({"mistral", "ministral3", "phi3"})  # whatever layer types the configuration lists
_GEMMA = frozenset({"gemma2", "gemma3_text"})  # which scale embeddings and norm what mixer and MLP give
_OFFSET_NORMS = _GEMMA | {"qwen3_5_text", "qwen3_5_moe_text"}
_NORMED_HEADS = frozenset({"qwen3", "qwen3_moe", "gemma3_text", "qwen3_5_text", "qwen3_5_moe_text"})
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Attention:
    """Causal attention of grouped heads.

    Attributes:
        queries: query heads.
        keys: key-value heads.
        size: of a head.
        scale: factor on the scores.
        rotary: the name of its rotary table.
        rotary_size: of a head's numbers, the first that are turned to their position (partial rotary embedding).
        window: tokens that a row sees at most, itself among them; None for all before it.
        normed: whether heads of queries and keys are normed (q_norm, k_norm).
        gated: whether q_proj gives each head its queries and then a gate, the sigmoid of which multiplies what the
            head attended.
        fused: whether one layer, qkv_proj, gives queries, keys and values.
        cap: c of c tanh(score / c), taken of scores before a row's softmax; None for scores as they are.
    """

    queries: int
    keys: int
    size: int
    scale: float
    rotary: str = ALL
    rotary_size: int = 0
    window: int | None = None
    normed: bool = False
    gated: bool = False
    fused: bool = False
    cap: float | None = None

    @property
    def group(self) -> int:
        """Query heads a key-value head."""
        return self.queries // self.keys


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net (Yang et al. 2024, https://arxiv.org/abs/2412.06464): a causal convolution over queries, keys
    and values, then a recurrence with a state [key_size, value_size] a value head.

    Attributes:
        key_heads: of queries and keys; each serves value_heads / key_heads of the values.
        kernel: tokens that the convolution sees, the newest among them.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int


@dataclass(frozen=True)
class MLP:
    """down(activation(gate(x)) * up(x)).

    Attributes:
        size: of its hidden layer.
        fused: whether one layer, gate_up_proj, gives gate and up.
    """

    size: int
    activation: Activation = "silu"
    fused: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of MLPs with SwiGLU, of which each token is sent to a few.

    Attributes:
        count: experts.
        chosen: by each token, those of the largest shares of a softmax over all.
        size: of an expert's hidden layer.
        normalised: whether the chosen ones' shares are divided by their sum.
        shared: size of the expert that all tokens go through, with a gate of its own; 0 where there is none.
    """

    count: int
    chosen: int
    size: int
    normalised: bool
    shared: int = 0


@dataclass(frozen=True)
class Layer:
    """x + mixer(norm(x)), then x + mlp(norm(x)); with `normed_outputs`, what both give is normed before it is added."""

    mixer: Attention | DeltaNet
    mlp: MLP | Experts
    normed_outputs: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder's layers, and what stands before and after them.

    Attributes:
        norm_offset: 1.0 where norms multiply by 1 + w instead of w; of a delta net's own norm it is always w.
        epsilon: of the norms.
        embedding_scale: factor on embeddings.
        logit_cap: c of c tanh(logit / c); None for logits as they are.
        context: the largest number of positions.
        short_context: tokens of the longest sample that still has the short factors of LongRoPE (Ding et al. 2024,
            https://arxiv.org/abs/2402.13753); a longer one has the long ones. None without.
        query_scaling: (beta, n): queries at position p are multiplied by 1 + beta ln(1 + floor(p / n)), as of Llama 4.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    epsilon: float
    context: int
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    short_context: int | None = None
    query_scaling: tuple[float, int] | None = None


def why_not(config: Any) -> str | None:
    """The reason why a model of this configuration cannot be computed by the fast kernels; None if it can."""
    if config.model_type not in MODEL_TYPES:
        return f'"{config.model_type}" is not one of the architectures with fast kernels'
    for rotary in _rotary_parameters(config):
        if rotary.get("rope_type") == "dynamic":
            return 'its rotary embedding ("dynamic") changes with the longest sample'
    if getattr(config, "attn_logit_softcapping", None) and config.model_type != "gemma2":
        return "the model caps its scores"  # a setting that Transformers reads, but computes nothing with
    if len(_rotary_parameters(config)) > 1 and any(r["rope_type"] == "longrope" for r in _rotary_parameters(config)):
        return "one of its rotary embeddings is LongRoPE, which is known here where layers share one"
    if _activation(config) not in _ACTIVATIONS:
        return f"the activation is {_activation(config)}, not {' or '.join(_ACTIVATIONS)}"
    if getattr(config, "attention_dropout", 0):
        return "the model drops attention weights"
    if getattr(config, "resid_pdrop", 0) or getattr(config, "embd_pdrop", 0):
        return "the model drops hidden states"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention sees later tokens"
    return None


def describe(config: Any) -> Architecture:
    """The architecture of a text model's configuration, for which `why_not` gives None.

    config: as Transformers holds it, its layer types and rotary parameters filled in.
    """
    kind, rotary = config.model_type, _rotary_parameters(config)[0]
    beta = rotary.get("llama_4_scaling_beta")
    return Architecture(
        layers=tuple(_layer(config, number) for number in range(config.num_hidden_layers)),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        epsilon=float(config.rms_norm_eps),
        context=config.max_position_embeddings,
        norm_offset=float(kind in _OFFSET_NORMS),
        embedding_scale=config.hidden_size**0.5 if kind in _GEMMA else 1.0,
        logit_cap=getattr(config, "final_logit_softcapping", None),
        short_context=rotary["original_max_position_embeddings"] if rotary["rope_type"] == "longrope" else None,
        query_scaling=(beta, rotary["original_max_position_embeddings"]) if beta else None,
    )


def _layer(config: Any, number: int) -> Layer:
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    kind = kinds[number] if kinds else "full_attention"
    mixer = _delta_net(config) if kind == "linear_attention" else _attention(config, kind)
    return Layer(mixer, _mlp(config, number), normed_outputs=config.model_type in _GEMMA)


def _attention(config: Any, kind: str) -> Attention:
    """kind: of `layer_types`."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    several = "rope_type" not in config.rope_parameters  # a table for each kind of layer
    rotary = config.rope_parameters[kind] if several else config.rope_parameters
    windowed = kind == "sliding_attention" or config.model_type in _WINDOW_EVERYWHERE
    return Attention(
        queries=config.num_attention_heads,
        keys=config.num_key_value_heads,
        size=size,
        scale=(getattr(config, "query_pre_attn_scalar", None) or size) ** -0.5,
        rotary=kind if several else ALL,
        rotary_size=int(size * rotary.get("partial_rotary_factor", 1.0)),
        window=getattr(config, "sliding_window", None) if windowed else None,
        normed=config.model_type in _NORMED_HEADS,
        gated=config.model_type in ("qwen3_5_text", "qwen3_5_moe_text"),
        fused=config.model_type == "phi3",
        cap=getattr(config, "attn_logit_softcapping", None),
    )


def _delta_net(config: Any) -> DeltaNet:
    return DeltaNet(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_size=config.linear_key_head_dim,
        value_size=config.linear_value_head_dim,
        kernel=config.linear_conv_kernel_dim,
    )


def _mlp(config: Any, number: int) -> MLP | Experts:
    every = getattr(config, "decoder_sparse_step", 1)
    dense = number in (getattr(config, "mlp_only_layers", None) or ()) or (number + 1) % every
    if getattr(config, "num_experts", 0) and not dense:
        return Experts(
            count=config.num_experts,
            chosen=config.num_experts_per_tok,
            size=config.moe_intermediate_size,
            normalised=getattr(config, "norm_topk_prob", True),
            shared=getattr(config, "shared_expert_intermediate_size", 0),
        )
    return MLP(config.intermediate_size, _ACTIVATIONS[_activation(config)], fused=config.model_type == "phi3")


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _rotary_parameters(config: Any) -> list[dict[str, Any]]:
    """One for each kind of layer, or one for all."""
    parameters = config.rope_parameters
    return [parameters] if "rope_type" in parameters else list(parameters.values())
