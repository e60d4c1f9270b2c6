"""A model's weights, with an adapter merged, put together as the decoder with a cache needs them."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.adapters.merge_stored import EMBEDDING, HEAD, MergedWeights
from qingtune.adapters.variants import LowRank
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.layer import (
    AnswerLayer,
    AnswerNorm,
    AttentionBlock,
    DeltaBlock,
    ExpertsBlock,
    MLPBlock,
)
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.answering.decoder.native.experts import NativeExperts
from qingtune.answering.decoder.native.matrices import NativeMatrix, fits_native
from qingtune.answering.decoder.packed import (
    ROWS_AT_A_TIME,
    Matrix,
    has_int4_kernels,
    pack,
    plus,
)
from qingtune.answering.decoder.rotary import Rotary, Table
from qingtune.kernels.architecture import ALL, MLP, Architecture, Attention, DeltaNet, Experts, Layer, describe
from qingtune.kernels.delta.answer import DeltaCore
from qingtune.kernels.device import Hardware, give_back_memory, has_int8_units
from qingtune.kernels.native.delta_step import LARGEST_HEAD
from qingtune.kernels.workspace import Workspace
from qingtune.models.layers import stored_tensors
from qingtune.models.multimodal import text_name

# Architectures checked (tests/invariant/answering) to answer here as Transformers does.
MODEL_TYPES = frozenset(
    {
        "qwen2",
        "qwen3",
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "qwen3_moe",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    }
)
HEAD_NUMBERS = 16  # of which the kernels in C take heads of attention
LEAST_HIDDEN = 256  # in a smaller model calling C costs more than a matrix's product, unless it computes whole steps
_LANGUAGE_MODEL = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")


def why_not(model: Any) -> str | None:
    """The reason why a model, with or without weights, cannot answer by the decoder with a cache; None if it can."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in MODEL_TYPES:
        return f'"{model.config.model_type}" is not one of the architectures with fast kernels for answers'
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ("silu", "gelu_pytorch_tanh"):
        return f"the activation is {activation}, not silu or gelu_pytorch_tanh"
    if "dynamic" in _rope_types(config):
        return 'its rotary embedding ("dynamic") changes with the longest sequence'
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention sees later tokens"
    if getattr(config, "attn_logit_softcapping", None) and config.model_type != "gemma2":
        return "its attention scores are capped"
    return "the head has a bias" if model.get_output_embeddings().bias is not None else None


def _rope_types(config: Any) -> set[str]:
    parameters = config.rope_parameters
    tables = [parameters] if "rope_type" in parameters else list(parameters.values())
    return {table["rope_type"] for table in tables}


def fits(model: Any, weights: MergedWeights) -> bool:
    """Whether all that a model's language model is made of is stored, in its shapes."""
    for name, tensor in stored_tensors(model).items():
        name, shape = text_name(name), tuple(tensor.shape)
        if (
            name.startswith(_LANGUAGE_MODEL)
            and weights.shapes.get(name) != shape
            and not _in_parts(name, shape, weights)
        ):
            return False
    return True


def _in_parts(name: str, shape: tuple[int, ...], weights: MergedWeights) -> bool:
    """Whether a tensor of all experts is stored as a matrix of each, gates and ups apart."""
    experts, _, kind = name.rpartition(".")
    if kind not in ("gate_up_proj", "down_proj") or len(shape) != 3:
        return False
    count, rows, columns = shape
    parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
    wanted = (rows // len(parts), columns)
    stored = (weights.shapes.get(f"{experts}.{number}.{part}_proj.weight") for number in range(count) for part in parts)
    return all(one == wanted for one in stored)


class Assembly:
    """Reads a model's weights a few at a time, with the adapter, and packs them.

    Args:
        model: without weights, for which `why_not` gives no reason against and `fits` is true.
        bits: 4 or 8 to hold the matrices in; None for the dtype.
        lazy: layers are read each time they are asked for, and not kept; matrices are multiplied by PyTorch as they
            are, the head from its file.
        apart: with lazy, the adapter's changes of linear layers are computed separately instead of merged.

    Attributes:
        library: the kernels in C, where they are used: for matrices, and for whole steps of the models they know.
    """

    def __init__(
        self,
        model: Any,
        weights: MergedWeights,
        hardware: Hardware,
        *,
        bits: int | None = None,
        lazy: bool = False,
        apart: bool = False,
    ) -> None:
        self.model, self.weights, self.bits, self.lazy, self.apart = model, weights, bits, lazy, apart
        self.config = model.config.get_text_config(decoder=True)
        self.architecture = describe(self.config)
        self.parameters = {text_name(name) for name in stored_tensors(model)}
        self.dtype, self.device = hardware.dtype, hardware.device
        self.workspace = Workspace(self.device)
        found = "" if lazy else native_kernels(model, hardware)
        self.library = None if isinstance(found, str) else found
        if weights.adapter:
            weights.adapter.check_names(weights.shapes)

    def decoder(self, slots: int = 1) -> CachedDecoder:
        """Everything in its place."""
        head = self._head()  # first, as packing it takes the most for a moment
        norm, layers = self._norm("model.norm"), self if self.lazy else list(self)
        library = self.library if _steps_in_c(self.architecture) else None
        return CachedDecoder(self.architecture, self._embedding(), layers, norm, head, self._rotary(), slots, library)

    def __iter__(self) -> Iterator[AnswerLayer]:
        """Layers in order, read when they are asked for; what packing one took is given back before the next."""
        counts = Counter[type]()
        for number, layer in enumerate(self.architecture.layers):
            yield self._layer(f"model.layers.{number}", layer, counts[type(layer.mixer)])
            counts[type(layer.mixer)] += 1
            give_back_memory()

    def _embedding(self) -> torch.Tensor:
        """[V, D]: only rows of it are looked up, so on a CPU it stays in its file if the adapter does not change it."""
        weight = self.weights.mapped(EMBEDDING)
        stays = self.device.type == "cpu" and EMBEDDING not in self.weights.changed
        return weight if stays else weight.to(self.device, self.dtype)

    def _head(self) -> Matrix:
        tied = self.model.config.tie_word_embeddings and HEAD not in self.weights.changed
        if self.lazy:
            weight = self.weights.mapped(EMBEDDING if tied else HEAD)
            return _DenseParts([(rows, None) for rows in weight.split(ROWS_AT_A_TIME)], None)
        # A tied head is mapped once more: pages that were read here are released.
        return self._pack(self._embedding() if tied else self.weights.read(HEAD), None, self.bits)

    def _layer(self, name: str, layer: Layer, number: int) -> AnswerLayer:
        """number: of the layer, among those with such a mixer."""
        if isinstance(layer.mixer, DeltaNet):
            mixer = self._delta_net(f"{name}.linear_attn", layer.mixer, number)
        else:
            mixer = self._attention(f"{name}.self_attn", layer.mixer, number)
        if isinstance(layer.mlp, Experts):
            mlp = self._experts(f"{name}.mlp", layer.mlp)
        else:
            mlp = self._mlp(f"{name}.mlp", layer.mlp)
        norms = [self._norm(f"{name}.input_layernorm"), self._norm(f"{name}.post_attention_layernorm")]
        if layer.normed_outputs:
            outer = [self._norm(f"{name}.{which}_feedforward_layernorm") for which in ("pre", "post")]
            return AnswerLayer(norms[0], mixer, outer[0], mlp, mixer_output_norm=norms[1], mlp_output_norm=outer[1])
        return AnswerLayer(norms[0], mixer, norms[1], mlp)

    def _attention(self, name: str, attention: Attention, number: int) -> AttentionBlock:
        normed = attention.normed
        return AttentionBlock(
            attention,
            number,
            qkv=self._joined(*(f"{name}.{part}_proj" for part in (("qkv",) if attention.fused else "qkv"))),
            q_norm=self._norm(f"{name}.q_norm") if normed else None,
            k_norm=self._norm(f"{name}.k_norm") if normed else None,
            o=self._joined(f"{name}.o_proj"),
        )

    def _delta_net(self, name: str, net: DeltaNet, number: int) -> DeltaBlock:
        parts = ("conv1d.weight", "A_log", "dt_bias", "norm.weight")
        taps, rate, bias, norm = (self.weights.read(f"{name}.{part}").to(self.device).float() for part in parts)
        taps, rate = taps[:, 0].t().contiguous(), -rate.exp()
        return DeltaBlock(
            DeltaCore(net, taps, rate, bias, norm, self.architecture.epsilon),
            number,
            qkv_z=self._joined(f"{name}.in_proj_qkv", f"{name}.in_proj_z"),
            b_a=self._joined(f"{name}.in_proj_b", f"{name}.in_proj_a", dense=True),
            out=self._joined(f"{name}.out_proj"),
        )

    def _mlp(self, name: str, mlp: MLP) -> MLPBlock:
        names = ["gate_up_proj"] if mlp.fused else ["gate_proj", "up_proj"]
        gate_up = self._joined(*(f"{name}.{part}" for part in names))
        return MLPBlock(gate_up, self._joined(f"{name}.down_proj"), mlp.activation)

    def _experts(self, name: str, experts: Experts) -> ExpertsBlock:
        """Router and shares are dense: their bytes are few, and a rounded router could choose other experts."""
        pairs = [
            (self._of_expert(name, "gate_up", number), self._of_expert(name, "down", number))
            for number in range(experts.count)
        ]
        shared = self._mlp(f"{name}.shared_expert", MLP(experts.shared)) if experts.shared else None
        block = ExpertsBlock(
            experts,
            self._joined(f"{name}.gate", dense=True),
            [MLPBlock(gate_up, down, "silu") for gate_up, down in pairs],
            shared,
            self._joined(f"{name}.shared_expert_gate", dense=True) if shared else None,
        )
        return replace(block, native=self._native_experts(block))

    def _native_experts(self, block: ExpertsBlock) -> NativeExperts | None:
        """The mixture in C, if all its matrices are."""
        router, gate = block.router, block.shared_gate
        pairs = [(mlp.gate_up, mlp.down) for mlp in (*block.mlps, *([block.shared] if block.shared else []))]
        native = [(one, two) for one, two in pairs if isinstance(one, NativeMatrix) and isinstance(two, NativeMatrix)]
        if self.library is None or len(native) < len(pairs) or not isinstance(router, NativeMatrix):
            return None
        shared = (native[-1], gate) if isinstance(gate, NativeMatrix) else None
        return NativeExperts(self.library, block.experts, router, native[: len(block.mlps)], shared)

    def _of_expert(self, name: str, kind: str, number: int) -> Matrix:
        """One expert's matrix, of a tensor of all experts or of a file with those of each apart."""
        together = f"{name}.experts.{kind}_proj"
        if together in self.weights.shapes:
            weight = self.weights.expert(together, number)
        else:
            parts = (f"{name}.experts.{number}.{part}_proj.weight" for part in kind.split("_"))
            weight = torch.cat([self.weights.read(part) for part in parts])
        if self.lazy:
            return _DenseParts([(weight, None)], None)
        return self._pack(weight, None, self.bits)

    def _norm(self, name: str) -> AnswerNorm:
        weight = self.weights.read(f"{name}.weight").to(self.device)
        if offset := self.architecture.norm_offset:
            return AnswerNorm(weight.float() + offset, self.architecture.epsilon)
        return AnswerNorm(weight.to(self.dtype), self.architecture.epsilon)

    def _joined(self, *names: str, dense: bool = False) -> Matrix:
        """Linear layers that read one input as one matrix; dense: in the dtype, whatever the others are held in."""
        bias = None
        if any(f"{name}.bias" in self.parameters for name in names):
            bias = torch.cat([self._bias(name) for name in names])
        if self.lazy:
            parts = [self._part(f"{name}.weight") for name in names]
            return _DenseParts(parts, None if bias is None else bias.to(self.device, self.dtype))
        weight = torch.cat([self.weights.read(f"{name}.weight") for name in names])
        return self._pack(weight, bias, None if dense else self.bits)

    def _bias(self, name: str) -> torch.Tensor:
        """Of a linear layer: zeros where it has none."""
        if f"{name}.bias" in self.parameters:
            return self.weights.read(f"{name}.bias")
        return torch.zeros(self.weights.shapes[f"{name}.weight"][0])

    def _part(self, name: str) -> tuple[torch.Tensor, LowRank | None]:
        """A weight, and the adapter's change of it where that is not merged."""
        low = self.weights.adapter.layers.get(name) if self.apart and self.weights.adapter else None
        if not isinstance(low, LowRank):  # a linear layer's is no other
            return self.weights.read(name).to(self.device, self.dtype), None
        weight = self.weights.unchanged(name).to(self.device, self.dtype)
        return weight, low.on_unchanged_base(weight, name)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, bits: int | None) -> Matrix:
        if self.library and fits_native(weight.shape[1]):
            return NativeMatrix(self.library, weight, bias, bits, self.dtype, self.workspace)
        bits = 8 if bits == 4 and not has_int4_kernels() else bits
        bias, units = None if bias is None else bias.to(self.device), has_int8_units(self.device)
        return pack(weight.to(self.device), bias, bits, self.dtype, self.workspace, int8_units=units)

    def _rotary(self) -> Rotary:
        module = dict(self.model.named_modules())
        (rotary,) = (one for name, one in module.items() if text_name(name) == "model.rotary_emb")
        names = {mixer.rotary for layer in self.architecture.layers if isinstance(mixer := layer.mixer, Attention)}
        return Rotary(
            functools.partial(_table, rotary, self.dtype, self.device),
            names,
            stretched_from=self.architecture.short_context,
            query_scaling=self.architecture.query_scaling,
        )


def _table(rotary: Any, dtype: torch.dtype, device: torch.device, name: str, length: int) -> Table:
    """The model's own table of some positions, which repeats it for the second half of what is turned."""
    which = {} if name == ALL else {"layer_type": name}
    cos, sin = rotary(torch.empty(0, dtype=dtype), torch.arange(length)[None], **which)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous().to(device), sin[0, :, :half].contiguous().to(device)


def native_kernels(model: Any, hardware: Hardware) -> ctypes.CDLL | str:
    """The kernels in C, for bf16 and fp32 on a CPU; or why they cannot be used, "" where they are not for."""
    architecture = describe(model.config.get_text_config(decoder=True))
    known = hardware.device.type == "cpu" and hardware.dtype in (torch.bfloat16, torch.float32)
    worth_it = _steps_in_c(architecture) or architecture.hidden >= LEAST_HIDDEN
    return native_library() if known and worth_it and has_native_units() else ""


def _steps_in_c(architecture: Architecture) -> bool:
    """Whether the kernels in C compute a model's new tokens as a whole: its sizes are multiples of theirs."""
    widths, heads = {architecture.hidden}, {HEAD_NUMBERS}
    for layer in architecture.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, Attention):
            widths.add(mixer.queries * mixer.size)
            heads.add(mixer.size)
        else:
            widths.add(mixer.value_heads * mixer.value_size)
            if max(mixer.key_size, mixer.value_size) > LARGEST_HEAD:
                return False
        widths |= {mlp.size, mlp.shared} if isinstance(mlp, Experts) else {mlp.size}
    return all(map(fits_native, widths)) and not any(size % HEAD_NUMBERS for size in heads)


@dataclass(frozen=True)
class _DenseParts:
    """Weights [n, K] that read one input, some with an adapter's change, which is computed separately as in training.

    A weight may stay in its file: it is converted for each product.
    """

    parts: Sequence[tuple[torch.Tensor, LowRank | None]]
    bias: torch.Tensor | None

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N], N the sum of n."""
        parts = [low.product(weight, x) if low else F.linear(x, weight.to(x)) for weight, low in self.parts]
        return plus(torch.cat(parts, 1), self.bias, added)
