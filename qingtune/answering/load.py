"""Base model and adapter as answering needs them: merged, packed, with a cache; or the model's modules where those do
not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qingtune.adapters.merge_stored import MergedWeights, StoredAdapter
from qingtune.adapters.peft_files import load_adapter, read_adapter
from qingtune.answering.assembly import Assembly, fits, native_kernels, why_not
from qingtune.answering.decoder.packed import has_int4_kernels
from qingtune.answering.generate import Decoder
from qingtune.kernels.device import Hardware, memory_errors
from qingtune.models.base import SMALLER, check_memory, load_base
from qingtune.models.load import empty_model, stored_dtype
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
    reason = why_not(model)
    if reason is None and bits and hardware.device.type != "cpu":
        reason = "packed products are only for CPUs"
    if reason is None and bits == 4:
        reason = _why_no_4_bits(model, hardware)
    if reason is None and not fits(model, weights):
        reason = "its weights are stored under other names or shapes"
    return model, weights, reason


def _why_no_4_bits(model: Any, hardware: Hardware) -> str | None:
    native = native_kernels(model, hardware)
    if not isinstance(native, str) or has_int4_kernels():
        return None
    return "this machine's PyTorch packs 4 bits in a layout not known here" + (f", and {native}" if native else "")
