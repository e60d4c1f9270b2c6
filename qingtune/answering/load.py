"""Base model and adapter as answering needs them: merged, packed, with a cache; or the model's modules where those do
not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.adapters.merge_stored import EMBEDDING, HEAD, MergedWeights, StoredAdapter
from qingtune.adapters.peft_files import load_adapter, read_adapter
from qingtune.adapters.variants import LowRank
from qingtune.answering.decoder.cache import AnswerShape
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.answering.decoder.native.matrices import NativeMatrix, fits_native
from qingtune.answering.decoder.packed import (
    ROWS_AT_A_TIME,
    AnswerLayer,
    AnswerNorm,
    Matrix,
    has_int4_kernels,
    pack,
    plus,
)
from qingtune.answering.generate import Decoder
from qingtune.kernels.decoder import why_not
from qingtune.kernels.device import Hardware, give_back_memory, has_int8_units, memory_errors
from qingtune.kernels.workspace import Workspace
from qingtune.models.base import SMALLER, check_memory, load_base
from qingtune.models.load import empty_model, stored_dtype
from qingtune.output.console import say

FAMILIES = frozenset({"qwen2", "qwen3", "llama"})  # that the cached decoder computes


class ModulesDecoder:
    """A model of Transformers, one sequence at a time; a prompt that extends the last one is not read again."""

    slots = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._ids: list[int] = []
        self._cache: Any = None

    @torch.inference_mode()
    def start(self, ids: Sequence[int], slot: int = 0) -> torch.Tensor:
        """Read a prompt; gives logits [V]."""
        from transformers import DynamicCache

        held = len(self._ids)
        if not held or held >= len(ids) or list(ids[:held]) != self._ids:
            self._ids, self._cache, held = [], DynamicCache(config=self.model.config), 0
        return self._read(ids[held:])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one token; gives logits [1, V]."""
        return self._read(tokens)[None]

    def move(self, source: int, target: int) -> None:
        """There is one slot only."""

    @torch.inference_mode()
    def logits_at(self, ids: Sequence[int], places: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [n, V] that follow places of a text, in one piece."""
        inputs, wanted = (torch.tensor(list(numbers), device=self.device) for numbers in (ids, places))
        yield self.model(input_ids=inputs[None], use_cache=False, logits_to_keep=wanted).logits[0]

    def _read(self, ids: Sequence[int]) -> torch.Tensor:
        inputs = torch.tensor([list(ids)], device=self.device)
        held, self._ids = self._ids, []  # nothing can be reused if this is interrupted, as by Ctrl-C
        output = self.model(input_ids=inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._ids = [*held, *ids]
        return output.logits[0, -1]


def load_decoder(
    folder: Path, adapter: Path | None, bits: int | None, hardware: Hardware, cache_dir: str | None, slots: int
) -> Decoder:
    """The fastest decoder that is right for a model.

    Args:
        folder: of the base model.
        adapter: its folder; None for the base alone.
        bits: 4 or 8, in which the weights are held; None for the hardware's dtype.
        slots: sequences to be read at a time, where the decoder can.

    Raises:
        UserError: files are missing or broken, do not fit each other, or there is no memory for them.
    """
    stored_adapter = read_adapter(adapter) if adapter else None
    with memory_errors("the model was loaded", folder, SMALLER):
        model, weights, reason = open_model(folder, stored_adapter, bits, hardware)
        if reason is None:
            if bits == 4 and weights.packed:
                say("The 4-bit weights are rounded again into the format of the fast kernels; load_in_8bit loses less.")
            assembly = Assembly(model, weights, hardware, bits=bits)
            kept = bits
            if bits is None and assembly.library and hardware.dtype == torch.float32:
                # Dense weights keep their own 16 bits in C, or the upper 24 of what is merged in fp32.
                kept = 16 if adapter is None and stored_dtype(folder).itemsize == 2 else 24
            check_memory(folder, hardware.dtype, kept, hardware.device)
            if assembly.no_library:
                say(f"Using PyTorch kernels (slower): {assembly.no_library}.")
            return assembly.decoder(slots)
    say(f"Using general kernels (slower): {reason}.")
    model = load_base(folder, hardware.dtype, bits, hardware.device, cache_dir)
    if adapter:
        load_adapter(model, adapter)
    return ModulesDecoder(model.eval())


def open_model(
    folder: Path, adapter: StoredAdapter | None, bits: int | None, hardware: Hardware
) -> tuple[Any, MergedWeights, str | None]:
    """A model without weights, its stored ones, and the reason why they cannot be computed by our kernels."""
    model, weights = empty_model(folder, hardware.dtype), MergedWeights(folder, adapter)
    reason, kind = why_not(model), model.config.model_type
    if reason is None and kind not in FAMILIES:
        reason = f'"{kind}" is not one of the architectures with fast kernels for answers'
    if reason is None and bits and hardware.device.type != "cpu":
        reason = "packed products are only for CPUs"
    if reason is None and bits == 4 and not has_int4_kernels():
        reason = "this machine's PyTorch packs 4 bits in a layout not known here"
    if reason is None and not weights.fit(model):
        reason = "its weights are stored under other names or shapes"
    return model, weights, reason


class Assembly:
    """Reads a model's weights a few at a time, with the adapter, and packs them.

    Args:
        model: without weights, for which `open_model` gives no reason against.
        bits: 4 or 8 to hold the matrices in; None for the dtype.
        lazy: layers are read each time they are asked for, and not kept; matrices are multiplied by PyTorch as they
            are, the head from its file.
        apart: with lazy, the adapter's changes of linear layers are computed separately instead of merged.

    Attributes:
        library: the kernels in C, where they are used.
        no_library: why they are not, on a machine and for a model that they are for; empty otherwise.
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
        self.dtype, self.device = hardware.dtype, hardware.device
        self.workspace = Workspace(self.device)
        found = "" if lazy or not _may_be_native(model, hardware) else native_library()
        self.library, self.no_library = (None, found) if isinstance(found, str) else (found, "")
        if weights.adapter:
            weights.adapter.check_names(weights.shapes)

    def decoder(self, slots: int = 1) -> CachedDecoder:
        """Everything in its place."""
        attention, config = self.model.model.layers[0].self_attn, self.model.config
        shape = AnswerShape(
            layers=len(self.model.model.layers),
            queries=config.num_attention_heads,
            keys=config.num_key_value_heads,
            size=attention.head_dim,
            scale=float(attention.scaling),
            context_length=config.max_position_embeddings,
        )
        head = self._head()  # first, as packing it takes the most for a moment
        norm, layers = self._norm("model.norm"), self if self.lazy else list(self)
        return CachedDecoder(shape, self._embedding(), layers, norm, head, self._rotary(), slots, self.library)

    def __iter__(self) -> Iterator[AnswerLayer]:
        """Layers in order, read when they are asked for; what packing one took is given back before the next."""
        for number in range(len(self.model.model.layers)):
            yield self._layer(number)
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
        return self._pack(self._embedding() if tied else self.weights.read(HEAD), None)

    def _layer(self, number: int) -> AnswerLayer:
        name = f"model.layers.{number}"
        normed = "q_norm" in dict(self.model.get_submodule(f"{name}.self_attn").named_children())
        return AnswerLayer(
            input_norm=self._norm(f"{name}.input_layernorm"),
            qkv=self._joined(*(f"{name}.self_attn.{part}_proj" for part in "qkv")),
            q_norm=self._norm(f"{name}.self_attn.q_norm") if normed else None,
            k_norm=self._norm(f"{name}.self_attn.k_norm") if normed else None,
            o=self._joined(f"{name}.self_attn.o_proj"),
            mlp_norm=self._norm(f"{name}.post_attention_layernorm"),
            gate_up=self._joined(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            down=self._joined(f"{name}.mlp.down_proj"),
        )

    def _norm(self, name: str) -> AnswerNorm:
        weight = self.weights.read(f"{name}.weight").to(self.device, self.dtype)
        return AnswerNorm(weight, float(self.model.get_submodule(name).variance_epsilon))

    def _joined(self, *names: str) -> Matrix:
        """Linear layers that read one input as one matrix."""
        modules = [self.model.get_submodule(name) for name in names]
        bias = None
        if any(module.bias is not None for module in modules):
            biases = [
                torch.zeros(module.out_features) if module.bias is None else self.weights.read(f"{name}.bias")
                for name, module in zip(names, modules, strict=True)
            ]
            bias = torch.cat(biases)
        if self.lazy:
            parts = [self._part(f"{name}.weight") for name in names]
            return _DenseParts(parts, None if bias is None else bias.to(self.device, self.dtype))
        return self._pack(torch.cat([self.weights.read(f"{name}.weight") for name in names]), bias)

    def _part(self, name: str) -> tuple[torch.Tensor, LowRank | None]:
        """A weight, and the adapter's change of it where that is not merged."""
        low = self.weights.adapter.layers.get(name) if self.apart and self.weights.adapter else None
        if low is None:
            return self.weights.read(name).to(self.device, self.dtype), None
        weight = self.weights.unchanged(name).to(self.device, self.dtype)
        return weight, low.on_unchanged_base(weight, name)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        if self.library:
            return NativeMatrix(self.library, weight, bias, self.bits, self.dtype, self.workspace)
        bias = None if bias is None else bias.to(self.device)
        units = has_int8_units(self.device)
        return pack(weight.to(self.device), bias, self.bits, self.dtype, self.workspace, int8_units=units)

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, [context, d / 2]."""
        positions = torch.arange(self.model.config.max_position_embeddings)[None]
        cos, sin = self.model.model.rotary_emb(torch.empty(0, dtype=self.dtype), positions)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous().to(self.device), sin[0, :, :half].contiguous().to(self.device)


def _may_be_native(model: Any, hardware: Hardware) -> bool:
    """Whether the kernels in C are for a model: in bf16 or fp32 on a CPU, every matrix a multiple of their blocks."""
    config, size = model.config, model.model.layers[0].self_attn.head_dim
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * size)
    return (
        hardware.device.type == "cpu"
        and hardware.dtype in (torch.bfloat16, torch.float32)
        and has_native_units()
        and size % 32 == 0
        and all(fits_native(width, width) for width in widths)
        and fits_native(config.vocab_size, config.hidden_size)
    )


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
