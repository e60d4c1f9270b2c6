"""What a GGUF file says of a model's positions, attention and biases, in the words of a config.json.

Transformers' reader passes this over, or takes it to be as in the published models; the facts are those of llama.cpp's
loaders (src/llama-model.cpp, src/models/*.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# By which llama.cpp knows the largest Gemma of each kind, the scores of which are scaled by hidden_size / heads.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


class GGUFSettings:
    """Settings of a file.

    Args:
        kind: the architecture, by llama.cpp's name.
        values: the header's.
        tensors: names of its tensors.
        factors: those of ROPE_FACTORS that it has.
    """

    def __init__(
        self, kind: str, values: Mapping[str, Any], tensors: Collection[str], factors: Mapping[str, list[float]]
    ) -> None:
        self._kind, self._values, self._tensors, self._factors = kind, values, tensors, factors

    def config(self) -> dict[str, Any]:
        """The settings; of architectures that are not known here, none."""
        if self._kind == "gemma2":
            return self._gemma2()
        if self._kind == "gemma3":
            return self._gemma3()
        if self._kind in ("qwen35", "qwen35moe"):
            sections = [size for size in self._value("rope.dimension_sections", []) if size]
            return {"rope_parameters": {**self._rope(), "mrope_section": sections, "mrope_interleaved": True}}
        if self._kind == "phi3":
            original = self._value("rope.scaling.original_context_length", self._value("context_length"))
            return {"rope_parameters": self._rope(), "original_max_position_embeddings": original}
        if self._kind == "llama":
            biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
            found = {name: tensor in self._tensors for name, tensor in biases.items()}
            return {"rope_parameters": self._rope(), **found}
        return {"rope_parameters": self._rope()} if self._kind in ("qwen2", "qwen3", "qwen3moe") else {}

    def _value(self, name: str, usual: Any = None) -> Any:
        return self._values.get(f"{self._kind}.{name}", usual)

    @property
    def _head_dim(self) -> int:
        return self._value("attention.key_length") or self._value("embedding_length") // self._value(
            "attention.head_count"
        )

    def _rope(self) -> dict[str, Any]:
        """How positions turn heads."""
        rope: dict[str, Any] = {"rope_theta": self._value("rope.freq_base", 10000.0)}
        dims = self._value("rope.dimension_count", self._head_dim)
        if dims != self._head_dim or self._kind == "phi3":  # for which Transformers needs it written out
            rope["partial_rotary_factor"] = dims / self._head_dim
        return {**rope, **self._scaling()}

    def _scaling(self) -> dict[str, Any]:
        """What stretches positions beyond those of pretraining."""
        original = self._value("rope.scaling.original_context_length", self._value("context_length"))
        if self._factors:  # of llama3 or LongRoPE; for Transformers LongRoPE is the form that takes any factors
            one, short, long = (self._factors.get(name) for name in ROPE_FACTORS)
            return {
                "rope_type": "longrope",
                "short_factor": one or short,
                "long_factor": one or long,
                "attention_factor": self._value("rope.scaling.attn_factor", 1.0),
                "original_max_position_embeddings": original,
            }
        kind, factor = self._value("rope.scaling.type", "linear"), self._value("rope.scaling.factor", 0.0)
        if kind == "yarn" and factor:
            usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            return {
                "rope_type": "yarn",
                "factor": factor,
                "attention_factor": usual * self._value("rope.scaling.attn_factor", 1.0),
                "original_max_position_embeddings": original,
            }
        linear = kind == "linear" and factor not in (0.0, 1.0)
        return {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}

    def _gemma(self, period: int, window: int) -> dict[str, Any]:
        """What Gemma 2 and 3 have in common.

        Args:
            period: every n-th layer has full attention; where the file does not say which.
            window: where the file does not say how many tokens the others see.
        """
        layers, window = self._value("block_count"), self._value("attention.sliding_window", window)
        pattern = self._value("attention.sliding_window_pattern", period)
        if not isinstance(pattern, list):
            pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(layers)]
        scaled_by_width = layers == _GEMMA_27B_LAYERS[self._kind]
        width = self._value("embedding_length") // self._value("attention.head_count")
        return {
            "query_pre_attn_scalar": width if scaled_by_width else self._head_dim,
            "layer_types": ["sliding_attention" if window and one else "full_attention" for one in pattern],
        }

    def _gemma2(self) -> dict[str, Any]:
        return {
            **self._gemma(2, 4096),
            "attn_logit_softcapping": self._value("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": self._value("final_logit_softcapping", 30.0),
            "rope_parameters": self._rope(),
        }

    def _gemma3(self) -> dict[str, Any]:
        sliding = {"rope_type": "default", "rope_theta": self._value("rope.freq_base_swa", 10000.0)}
        return {
            **self._gemma(6, 0),
            "final_logit_softcapping": self._value("final_logit_softcapping"),
            "rope_parameters": {"full_attention": self._rope(), "sliding_attention": sliding},
        }
