"""A model's parameters from its config.json alone: every module with its name and shape, without torch.

Names and shapes are those of Transformers' models, so that settings name modules here as they do in training. A
mixture's experts are one parameter there, not linear layers: adapters and quantisation pass them by, here as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from qingtune.errors import UserError

Kind = Literal["linear", "embedding", "head", "vector", "experts", "router"]


@dataclass(frozen=True)
class Module:
    """A module that holds parameters of its own.

    Attributes:
        name: full, as in Transformers.
        kind: linear layers are those that adapters and quantisation take.
        shape: of its matrix, [out, in] for linear layers; of its vector.
        bias: numbers beside.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    bias: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape) + self.bias


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model; sizes in numbers.

    Attributes:
        model_type: Transformers' name of the architecture.
        inner: size of a token's MLP, in a mixture that of all experts a token goes through.
        head_size: of one attention head.
        context: tokens it knows positions for; None if it does not say.
        stored_itemsize: bytes a number on disk.
        tied: whether head and embedding are one matrix; it stands among the modules once then, as the embedding.
        plain: whether all layers are alike, with dense MLPs and full attention.
        experts: of a mixture's layer; 0 where there are none.
        notices: what the user should know of the counting.
    """

    model_type: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    context: int | None
    stored_itemsize: int
    tied: bool
    query_key_norm: bool
    plain: bool
    modules: tuple[Module, ...]
    experts: int = 0
    experts_per_token: int = 0
    notices: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All of the model's numbers."""
        return sum(module.parameters for module in self.modules)

    @property
    def linear(self) -> tuple[Module, ...]:
        """The linear layers but the head, in the model's order."""
        return tuple(module for module in self.modules if module.kind == "linear")

    @property
    def active_body(self) -> int:
        """Weights that one token is multiplied by, embedding and head not counted."""
        dense = sum(module.parameters for module in self.modules if module.kind in ("linear", "router"))
        experts = sum(module.parameters for module in self.modules if module.kind == "experts")
        return dense + (experts * self.experts_per_token // self.experts if experts else 0)

    def module_names(self) -> list[str]:
        """Full names of all modules, those that only hold others included."""
        names: dict[str, None] = {}
        for module in self.modules:
            parts = module.name.split(".")
            for count in range(1, len(parts) + 1):
                names[".".join(parts[:count])] = None
        return list(names) + (["lm_head"] if self.tied else [])


# --- Architectures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """How an architecture differs from Llama's; biases: True, False or the setting of config.json that says so.

    Attributes:
        defaults: what holds where config.json says nothing.
        extra_norms: RMSNorms of a layer beyond the two that all have.
        fused: whether query, key and value, and gate and up, are one matrix each.
    """

    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    query_key_norm: bool = False
    extra_norms: tuple[str, ...] = ()
    fused: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])


_FOUR_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_FAMILIES: dict[str, _Family] = {
    "llama": _Family(mlp_bias="mlp_bias"),
    "mistral": _Family(False, False),
    "qwen2": _Family(True, False),
    "qwen3": _Family(query_key_norm=True, defaults={"head_dim": 128}),
    "granite": _Family(mlp_bias="mlp_bias"),
    "smollm3": _Family(mlp_bias="mlp_bias", defaults={"tie_word_embeddings": True}),
    "gemma": _Family(defaults=_GEMMA),
    "gemma2": _Family(extra_norms=_FOUR_NORMS, defaults=_GEMMA),
    # Its published files leave out what is as in the 4B model.
    "gemma3_text": _Family(
        query_key_norm=True,
        extra_norms=_FOUR_NORMS,
        defaults={**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208},
    ),
    "phi3": _Family(False, False, fused=True),
    "mixtral": _Family(False, False, defaults={"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": _Family(
        "qkv_bias",
        False,
        defaults={
            "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": _Family(
        query_key_norm=True, defaults={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    ),
    "deepseek_v3": _Family(
        "attention_bias",
        defaults={
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128,
        },
    ),
}  # fmt: skip
# What no model is near to; beyond it a header is broken, and counting its modules would take all memory.
MOST_LAYERS, LARGEST_NUMBER = 10_000, 10**9
# Names under which config.json may hold the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ITEMSIZES = {"float32": 4, "float64": 8}


class _Config:
    """config.json, its text part if it has several, with the architecture's defaults beneath.

    Raises:
        UserError: it names no architecture.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        text = content.get("text_config")
        values = {**content, **text} if isinstance(text, dict) else dict(content)
        self.where, self.nested = where, isinstance(text, dict)
        model_type = values.get("model_type")
        if not isinstance(model_type, str):
            raise UserError("it names no model_type", where=where)
        self.model_type = model_type
        self.family = _FAMILIES.get(self.model_type, _Family(mlp_bias="mlp_bias"))
        present = {name: value for name, value in values.items() if value is not None}
        self._given = present
        self._values: dict[str, Any] = {**self.family.defaults, **present}
        if "q_lora_rank" in values and values["q_lora_rank"] is None:  # null means none here, not the default
            del self._values["q_lora_rank"]

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number above 0.

        Raises:
            UserError: it is missing and has no default, or is something else.
        """
        value = self._values.get(name, default)
        if value is None:
            raise UserError(f'it does not say "{name}", without which the model cannot be planned', where=self.where)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f'"{name}" is {value!r}, where a whole number above 0 is wanted', where=self.where)
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST_NUMBER
        if value > most:
            raise UserError(f'"{name}" is more than {most:,}, which no model has', where=self.where)
        return value

    def count(self, name: str) -> int:
        """A whole number, 0 where it is not given."""
        return self.number(name) if self._values.get(name) else 0

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers, empty where it is not given."""
        return self._list(name, int, "numbers")

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty where it is not given."""
        return self._list(name, str, "texts")

    def _list(self, name: str, kind: type[Any], kinds: str) -> list[Any]:
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(one, kind) for one in cast("list[Any]", value)):
            raise UserError(f'"{name}" is {value!r}, where a list of {kinds} is wanted', where=self.where)
        return cast("list[Any]", value)

    def experts(self) -> int:
        """Experts of a mixture's layer; what is given counts before what the architecture has by default."""
        names = [name for name in _EXPERTS if self.count(name)]
        given = [name for name in names if name not in self.family.defaults or self._given.get(name)]
        return next((self.number(name) for name in (*given, *names)), 0)

    def flag(self, name: bool | str) -> bool:
        """Itself, or a setting of this name.

        Raises:
            UserError: that is neither true nor false, such as the text "false".
        """
        value = self._values.get(name, False) if isinstance(name, str) else name
        if not isinstance(value, bool):
            raise UserError(f'"{name}" is {value!r}, where true or false is wanted', where=self.where)
        return value

    def text(self, *names: str) -> str:
        """The first that is given, as text."""
        return next((str(self._values[name]) for name in names if self._values.get(name)), "")


def shape_of_config(content: Mapping[str, Any], where: str) -> ModelShape:
    """A model's shape from what its config.json holds.

    Args:
        content: the JSON object; an object under text_config is taken as the language model's.
        where: the file, for messages.

    Raises:
        UserError: a size is missing or is no number.
    """
    config = _Config(content, where)
    heads, layers = config.number("num_attention_heads"), config.number("num_hidden_layers")
    head_size = config.number("head_dim", max(1, config.number("hidden_size") // heads))
    experts = config.experts()
    mixed = [_is_mixture(config, number, experts) for number in range(layers)]
    per_token = config.number("num_experts_per_tok", 1) if experts else 0
    if config.count("kv_lora_rank"):
        head_size = config.number("v_head_dim")
    tied = config.flag("tie_word_embeddings")
    modules = tuple(_modules(config, head_size, experts, mixed, tied))
    return ModelShape(
        model_type=config.model_type,
        layers=layers,
        hidden=config.number("hidden_size"),
        inner=_inner(config, per_token) if any(mixed) else config.number("intermediate_size"),
        heads=heads,
        key_heads=config.number("num_key_value_heads", heads),
        head_size=head_size,
        vocabulary=config.number("vocab_size"),
        context=config.count("max_position_embeddings") or None,
        stored_itemsize=_ITEMSIZES.get(config.text("dtype", "torch_dtype") or "float32", 2),
        tied=tied,
        query_key_norm=config.family.query_key_norm,
        plain=_is_plain(config, experts),
        modules=modules,
        notices=tuple(_notices(config, content)),
        experts=experts if any(mixed) else 0,
        experts_per_token=per_token,
    )


def _is_plain(config: _Config, experts: int) -> bool:
    """Whether every layer is a dense one with full attention."""
    kinds = set(config.texts("layer_types"))
    sliding = config.flag("use_sliding_window") and config.count("sliding_window")
    return not (experts or kinds - {"full_attention"} or sliding)


def _notices(config: _Config, content: Mapping[str, Any]) -> Iterator[str]:
    stored: Any = content.get("quantization_config")
    method = cast("dict[str, Any]", stored).get("quant_method") if isinstance(stored, dict) else None
    if method not in (None, "bitsandbytes"):
        yield f"Its weights are stored quantised by {method}, which training refuses; this is for its 16-bit version."
    if config.nested:
        yield "Only the language part of this model is counted."
    if config.model_type not in _FAMILIES:
        yield f'The architecture "{config.model_type}" is counted as if it were Llama\'s; the run may differ.'


def _is_mixture(config: _Config, number: int, experts: int) -> bool:
    """Whether a layer's MLP is a mixture of experts, by the rules of the architectures that have them."""
    if not experts or number < config.count("first_k_dense_replace") or number in config.numbers("mlp_only_layers"):
        return False
    return (number + 1) % config.number("decoder_sparse_step", 1) == 0


def _inner(config: _Config, per_token: int) -> int:
    """Size of the MLP of a token that goes through a mixture."""
    shared = config.count("shared_expert_intermediate_size")
    one = config.number("moe_intermediate_size", config.number("intermediate_size"))
    return (per_token + config.count("n_shared_experts")) * one + shared


def _modules(config: _Config, head_size: int, experts: int, mixed: list[bool], tied: bool) -> Iterator[Module]:
    hidden, vocabulary = config.number("hidden_size"), config.number("vocab_size")
    yield Module("model.embed_tokens", "embedding", (vocabulary, hidden))
    for number, mixture in enumerate(mixed):
        layer = f"model.layers.{number}"
        latent = bool(config.count("kv_lora_rank"))
        yield from (_latent_attention if latent else _attention)(config, f"{layer}.self_attn", head_size)
        yield from (
            _mixture(config, f"{layer}.mlp", experts)
            if mixture
            else _mlp(config, f"{layer}.mlp", config.number("intermediate_size"))
        )
        for name in ("input_layernorm", "post_attention_layernorm", *config.family.extra_norms):
            yield Module(f"{layer}.{name}", "vector", (hidden,))
    yield Module("model.norm", "vector", (hidden,))
    if not tied:
        yield Module("lm_head", "head", (vocabulary, hidden))


def _linear(name: str, out: int, into: int, bias: bool = False) -> Module:
    return Module(name, "linear", (out, into), out * bias)


def _attention(config: _Config, name: str, size: int) -> Iterator[Module]:
    hidden, family = config.number("hidden_size"), config.family
    heads = config.number("num_attention_heads")
    queries, keys = heads * size, config.number("num_key_value_heads", heads) * size
    bias = config.flag(family.qkv_bias)
    out = _linear(f"{name}.o_proj", hidden, queries, config.flag(family.out_bias))
    if family.fused:
        yield from (out, _linear(f"{name}.qkv_proj", queries + 2 * keys, hidden, bias))
    else:
        for part, width in (("q", queries), ("k", keys), ("v", keys)):
            yield _linear(f"{name}.{part}_proj", width, hidden, bias)
        yield out
    if family.query_key_norm:
        yield Module(f"{name}.q_norm", "vector", (size,))
        yield Module(f"{name}.k_norm", "vector", (size,))


def _latent_attention(config: _Config, name: str, value_size: int) -> Iterator[Module]:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1)."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    rotary, plain = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
    low_q, low_kv, bias = config.count("q_lora_rank"), config.number("kv_lora_rank"), config.flag("attention_bias")
    if low_q:
        yield _linear(f"{name}.q_a_proj", low_q, hidden, bias)
        yield Module(f"{name}.q_a_layernorm", "vector", (low_q,))
        yield _linear(f"{name}.q_b_proj", heads * (rotary + plain), low_q)
    else:
        yield _linear(f"{name}.q_proj", heads * (rotary + plain), hidden)
    yield _linear(f"{name}.kv_a_proj_with_mqa", low_kv + rotary, hidden, bias)
    yield Module(f"{name}.kv_a_layernorm", "vector", (low_kv,))
    yield _linear(f"{name}.kv_b_proj", heads * (plain + value_size), low_kv)
    yield _linear(f"{name}.o_proj", hidden, heads * value_size, bias)


def _mlp(config: _Config, name: str, inner: int) -> Iterator[Module]:
    hidden, bias = config.number("hidden_size"), config.flag(config.family.mlp_bias)
    if config.family.fused:
        yield _linear(f"{name}.gate_up_proj", 2 * inner, hidden)
    else:
        yield _linear(f"{name}.gate_proj", inner, hidden, bias)
        yield _linear(f"{name}.up_proj", inner, hidden, bias)
    yield _linear(f"{name}.down_proj", hidden, inner, bias)


def _mixture(config: _Config, name: str, experts: int) -> Iterator[Module]:
    hidden = config.number("hidden_size")
    one = config.number("moe_intermediate_size", config.number("intermediate_size"))
    yield Module(f"{name}.gate", "router", (experts, hidden))
    yield Module(f"{name}.experts", "experts", (experts, 3, one, hidden))
    if shared := config.count("shared_expert_intermediate_size"):
        yield from _mlp(config, f"{name}.shared_expert", shared)
        yield _linear(f"{name}.shared_expert_gate", 1, hidden)
    if shared := config.count("n_shared_experts"):
        yield from _mlp(config, f"{name}.shared_experts", shared * one)
