"""Base model and adapter as answering needs them: merged, packed, with a cache; or the model's modules where those do
not fit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qingtune.adapters.merge_stored import EMBEDDING, HEAD, StoredAdapter
from qingtune.adapters.peft_files import load_adapter, read_adapter
from qingtune.adapters.variants import LowRank
from qingtune.answering.decoder.cache import AnswerShape
from qingtune.answering.decoder.cached import CachedDecoder
from qingtune.answering.decoder.layer import AnswerLayer, AnswerNorm
from qingtune.answering.decoder.native.build import has_native_units, native_library
from qingtune.answering.decoder.native.matrices import fits_native, native_matrix
from qingtune.answering.decoder.packed import ROWS_AT_A_TIME, DenseMatrix, Matrix, has_int4_kernels, pack
from qingtune.answering.generate import Decoder
from qingtune.kernels.decoder import why_not
from qingtune.kernels.device import Hardware, give_back_memory, has_int8_units, memory_errors
from qingtune.kernels.workspace import Workspace
from qingtune.models.base import SMALLER, check_memory, load_base
from qingtune.models.load import empty_model, stored_dtype
from qingtune.models.stored_weights import StoredWeights
from qingtune.output.console import say


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

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read one token; gives logits [1, V]."""
        with torch.inference_mode():
            return self._read(tokens)[None]

    def move(self, source: int, target: int) -> None:
        """There is one slot only."""

    def logits_at(self, ids: Sequence[int], places: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [n, V] that follow places of a text, in one piece."""
        with torch.inference_mode():
            inputs, wanted = (torch.tensor(list(numbers), device=self.device) for numbers in (ids, places))
            logits = self.model(input_ids=inputs[None], use_cache=False, logits_to_keep=wanted).logits[0]
        yield logits

    def _read(self, ids: Sequence[int]) -> torch.Tensor:
        inputs = torch.tensor([list(ids)], device=self.device)
        held, self._ids = self._ids, []  # nothing can be reused if this is interrupted, as by Ctrl-C
        output = self.model(input_ids=inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._ids = [*held, *ids]
        return output.logits[0, -1]


def load_decoder(
    folder: Path,
    adapter: Path | None,
    bits: int | None,
    hardware: Hardware,
    cache_dir: str | None,
    slots: int,
) -> Decoder:
    """The fastest decoder that is right for a model.

    Args:
        folder: of the base model.
        adapter: its folder; None for the base alone.
        bits: 4 or 8, in which the weights are held; None for the hardware's dtype.
        hardware: where and in which dtype.
        cache_dir: the setting.
        slots: sequences to be read at a time, where the decoder can.

    Raises:
        UserError: files are missing or broken, do not fit each other, or there is no memory for them.
    """
    stored_adapter = read_adapter(adapter) if adapter else None
    with memory_errors("the model was loaded", folder, SMALLER):
        model, stored, reason = open_model(folder, bits, hardware)
        if reason is None:
            if bits == 4 and stored.packed:
                say("The 4-bit weights are rounded again into the format of the fast kernels; load_in_8bit loses less.")
            assembly = Assembly(model, stored, stored_adapter, hardware, bits=bits)
            kept = bits or _bits_kept(folder, stored_adapter) if assembly.exact else bits
            check_memory(folder, hardware.dtype, kept, hardware.device)
            if isinstance(assembly.library, str):
                say(f"Using PyTorch kernels (slower): {assembly.library}.")
            return assembly.decoder(slots)
    say(f"Using general kernels (slower): {reason}.")
    model = load_base(folder, hardware.dtype, bits, hardware.device, cache_dir)
    if adapter:
        load_adapter(model, adapter)
    return ModulesDecoder(model.eval())


def _bits_kept(folder: Path, adapter: StoredAdapter | None) -> int:
    """Of a dense weight that fp32 is multiplied by in C: its own 16, or the upper 24 of what is merged in fp32."""
    return 16 if adapter is None and stored_dtype(folder).itemsize == 2 else 24


def open_model(folder: Path, bits: int | None, hardware: Hardware) -> tuple[Any, StoredWeights, str | None]:
    """A model without weights, its stored ones, and the reason why they cannot be computed by our kernels."""
    model, stored = empty_model(folder, hardware.dtype), StoredWeights(folder)
    reason = why_not(model)
    if reason is None and bits and hardware.device.type != "cpu":
        reason = "packed products are only for CPUs"
    if reason is None and bits == 4 and not has_int4_kernels():
        reason = "this machine's PyTorch packs 4 bits in a layout not known here"
    if reason is None and not stored.fit(model):
        reason = "its weights are stored under other names or shapes"
    return model, stored, reason


class Assembly:
    """Reads a model's weights a few at a time, with the adapter, and packs them.

    Args:
        model: without weights, for which `open_model` gives no reason against.
        stored: its weights.
        adapter: None for the base alone.
        hardware: where and in which dtype.
        bits: 4 or 8 to hold the matrices in; None for the dtype.
        merge: whether the adapter is merged into the weights, or computed separately.
    """

    def __init__(
        self,
        model: Any,
        stored: StoredWeights,
        adapter: StoredAdapter | None,
        hardware: Hardware,
        *,
        bits: int | None = None,
        merge: bool = True,
    ) -> None:
        self.model, self.stored, self.adapter, self.bits, self.merge = model, stored, adapter, bits, merge
        self.dtype, self.device = hardware.dtype, hardware.device
        self.workspace = Workspace(self.device)
        self.library = native_library() if merge and _may_be_native(model, hardware) else None
        if adapter:
            adapter.check_names(stored.shapes)

    @property
    def exact(self) -> bool:
        """Whether fp32 is multiplied in C, by dense weights as they are stored."""
        return isinstance(self.library, ctypes.CDLL) and self.dtype == torch.float32

    def decoder(self, slots: int = 1, *, lazy: bool = False) -> CachedDecoder:
        """Everything in its place; with lazy, layers are read each time they are asked for, and not kept."""
        body = self.model.model
        attention = body.layers[0].self_attn
        config = self.model.config
        shape = AnswerShape(
            layers=len(body.layers),
            queries=config.num_attention_heads,
            keys=config.num_key_value_heads,
            size=attention.head_dim,
            scale=float(attention.scaling),
            context_length=config.max_position_embeddings,
        )
        layers = _Layers(self, body.layers)
        head = self._head()  # first, as packing it takes the most for a moment
        norm = self._norm("model.norm", body.norm)
        layers = layers if lazy else _kept(layers)
        library = self.library if isinstance(self.library, ctypes.CDLL) else None
        return CachedDecoder(shape, self._embedding(), layers, norm, head, self._rotary(), slots, library)

    def _read(self, name: str) -> torch.Tensor:
        weight = self.stored.read(name)
        return self.adapter.merged(name, weight) if self.adapter else weight

    def _embedding(self) -> torch.Tensor:
        """[V, D]: only rows of it are looked up, so on a CPU it stays in its file if the adapter does not change it."""
        if self.adapter and EMBEDDING in self.adapter.names:
            return self._read(EMBEDDING).to(self.device, self.dtype)
        mapped = self.stored.mapped(EMBEDDING)
        return mapped if self.device.type == "cpu" else mapped.to(self.device, self.dtype)

    def _head(self) -> Matrix:
        own = not self.model.config.tie_word_embeddings
        if self.adapter and HEAD in self.adapter.names:
            return self._pack(self.adapter.merged(HEAD, self.stored.read(HEAD if own else EMBEDDING)), None)
        if not self.merge:
            return FileMatrix(self.stored.mapped(HEAD if own else EMBEDDING), self.device)
        if own:
            return self._pack(self._read(HEAD), None)
        return self._pack(self._embedding(), None)  # mapped again: pages that were read here are released

    def layer(self, number: int, module: Any) -> AnswerLayer:
        """A layer's weights, read from the files."""
        name = f"model.layers.{number}"
        attention = module.self_attn
        normed = dict(attention.named_children())
        return AnswerLayer(
            input_norm=self._norm(f"{name}.input_layernorm", module.input_layernorm),
            qkv=self._joined(name, {f"self_attn.{part}": getattr(attention, part) for part in _QKV}),
            q_norm=self._norm(f"{name}.self_attn.q_norm", attention.q_norm) if "q_norm" in normed else None,
            k_norm=self._norm(f"{name}.self_attn.k_norm", attention.k_norm) if "k_norm" in normed else None,
            o=self._joined(name, {"self_attn.o_proj": attention.o_proj}),
            mlp_norm=self._norm(f"{name}.post_attention_layernorm", module.post_attention_layernorm),
            gate_up=self._joined(name, {f"mlp.{part}": getattr(module.mlp, part) for part in _GATE_UP}),
            down=self._joined(name, {"mlp.down_proj": module.mlp.down_proj}),
        )

    def _norm(self, name: str, module: Any) -> AnswerNorm:
        weight = self._read(f"{name}.weight").to(self.device, self.dtype)
        return AnswerNorm(weight, float(module.variance_epsilon))

    def _joined(self, layer: str, modules: dict[str, Any]) -> Matrix:
        """Linear layers that read one input as one matrix."""
        names = [f"{layer}.{part}" for part in modules]
        if not self.merge:
            return JoinedMatrix(
                [self._beside(name, module) for name, module in zip(names, modules.values(), strict=True)]
            )
        weight = torch.cat([self._read(f"{name}.weight") for name in names])
        biased = [module.bias is not None for module in modules.values()]
        if not any(biased):
            return self._pack(weight, None)
        biases = [
            self._read(f"{name}.bias") if has else torch.zeros(module.weight.shape[0])
            for name, module, has in zip(names, modules.values(), biased, strict=True)
        ]
        return self._pack(weight, torch.cat(biases))

    def _beside(self, name: str, module: Any) -> Matrix:
        """One linear layer with its adapter."""
        bias = self._read(f"{name}.bias").to(self.device, self.dtype) if module.bias is not None else None
        adapter = self.adapter.layers.get(f"{name}.weight") if self.adapter else None
        if adapter is None:
            return DenseMatrix(self._read(f"{name}.weight").to(self.device, self.dtype), bias)
        weight = self.stored.read(f"{name}.weight").to(self.device, self.dtype)
        return AdaptedMatrix(weight, bias, adapter.on_unchanged_base(weight, name))

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        if isinstance(self.library, ctypes.CDLL):
            return native_matrix(self.library, weight, bias, self.bits, self.dtype, self.workspace)
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


def _kept(layers: Sequence[AnswerLayer]) -> list[AnswerLayer]:
    """All layers; what packing one of them took is given back before the next."""
    kept: list[AnswerLayer] = []
    for layer in layers:
        kept.append(layer)
        give_back_memory()
    return kept


class _Layers(Sequence[AnswerLayer]):
    """Layers that are read when they are asked for."""

    def __init__(self, assembly: Assembly, modules: Any) -> None:
        self._assembly, self._modules = assembly, modules

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, number: Any) -> Any:
        return self._assembly.layer(range(len(self))[number], self._modules[number])


class FileMatrix:
    """A weight [N, K] that stays in its file, of which a part at a time is in memory in another dtype."""

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        self.weight, self.device = weight, device
        self.held_bytes = weight.numel() * weight.element_size()

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        parts = self.weight.split(ROWS_AT_A_TIME)
        y = torch.cat([x @ part.to(self.device, x.dtype).t() for part in parts], 1)
        return y if added is None else y.add_(added)


class JoinedMatrix:
    """Several matrices that read one input, each for itself."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self.parts = parts

    @property
    def held_bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(part.held_bytes for part in self.parts)

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        y = torch.cat([part.multiply(x) for part in self.parts], 1)
        return y if added is None else y.add_(added)


class AdaptedMatrix:
    """A weight and the adapter's change, computed separately as in training."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, adapter: LowRank) -> None:
        self.weight, self.bias, self.adapter = weight, bias, adapter

    @property
    def held_bytes(self) -> int:
        """Bytes that a product reads."""
        numbers = self.weight.numel() + self.adapter.a.numel() + self.adapter.b.numel()
        return numbers * self.weight.element_size()

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        y = self.adapter.product(self.weight, x)
        for part in (self.bias, added):
            y = y if part is None else y + part
        return y


_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
