"""An adapter alone as GGUF, which llama.cpp puts on its base when it loads that (`llama-cli -m BASE.gguf --lora FILE`).

llama.cpp adds alpha / rank B A to a weight, with the rank of each pair and one alpha for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qingtune.adapters.full_modules import modules_of
from qingtune.adapters.merge_stored import HEAD, StoredAdapter
from qingtune.adapters.variants import LowRank
from qingtune.errors import UserError
from qingtune.export.gguf_architectures import Value
from qingtune.export.gguf_layout import GGUFLayout, PlacedTensor

LORA_FORMS = ("f32", "f16", "bf16", "q8_0")
_MERGE_IT = "Export the merged model instead: leave out --format gguf_lora."


def lora_layout(
    adapter: StoredAdapter, layout: GGUFLayout, unchanged: Callable[[str], torch.Tensor]
) -> tuple[GGUFLayout, dict[str, torch.Tensor]]:
    """How an adapter lies in GGUF, and its tensors by the names that the layout has as sources.

    Args:
        adapter: of a base with this layout, as `StoredAdapter.for_base` gives it.
        layout: the base's.
        unchanged: gives a tensor of the base, for adapters that began as a part of its weights (PiSSA, OLoRA).

    Raises:
        UserError: GGUF has no such adapters.
    """
    _check(adapter, layout)
    pairs: dict[str, Pair] = {}
    for place in layout.tensors:
        if pair := _pair(adapter, place, unchanged):
            pairs[place.name] = pair
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        b = pair.b * (pair.alpha / alpha)  # by ranks and alphas of its own, this pair has another scaling
        tensors |= {f"{name}.lora_a": pair.a, f"{name}.lora_b": b}
    metadata: dict[str, Value] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    placed = [PlacedTensor(name, name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return GGUFLayout(layout.architecture, metadata, placed, 0), tensors


@dataclass(frozen=True)
class Pair:
    """What a file holds of the change of one of its tensors.

    Attributes:
        a: fp32 [r, in]; of experts [E, r, in].
        b: fp32 [out, r]; of experts [E, out, r].
        scaling: of their products.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def alpha(self) -> float:
        """What llama.cpp divides by the rank to get this scaling."""
        return float(f"{self.scaling * self.a.shape[-2]:.12g}")


def _pair(adapter: StoredAdapter, place: PlacedTensor, unchanged: Callable[[str], torch.Tensor]) -> Pair | None:
    """The change of a tensor of the base; None if the adapter leaves it alone."""
    found = [(source, adapter.layers[source]) for source in place.sources if source in adapter.layers]
    if not found:
        return None
    lows = [low.on_unchanged_base(unchanged(name), name) if isinstance(low, LowRank) else low for name, low in found]
    a, b = [low.a for low in lows], [low.b for low in lows]
    if place.stacked:
        return Pair(torch.stack(a), torch.stack(b), lows[0].scaling)
    number, parts = place.part
    rows = b[0].chunk(parts, -2)[number]
    return Pair(
        a[0][:, place.columns.index()] if place.columns else a[0],
        rows[place.rows.index()] if place.rows else rows,
        lows[0].scaling,
    )


def _check(adapter: StoredAdapter, layout: GGUFLayout) -> None:
    """Refuse what is not the sum of a weight and B A."""
    where = str(adapter.folder)
    if any(isinstance(low, LowRank) and low.magnitude is not None for low in adapter.layers.values()):
        raise UserError("a GGUF adapter cannot hold DoRA's magnitudes (use_dora)", where=where, fix=_MERGE_IT)
    if adapter.whole:
        modules = ", ".join(modules_of(adapter.whole))
        what = f"a GGUF adapter cannot hold modules that were trained in full (modules_to_save: {modules})"
        raise UserError(what, where=where, fix=_MERGE_IT)
    places = {source: place for place in layout.tensors for source in place.sources}
    for name, low in adapter.layers.items():
        if name == HEAD and name not in places:
            what = (
                f"the adapter changes {name}, which is the embedding in this base; llama.cpp has no head to put it on"
            )
            raise UserError(what, where=where, fix=_MERGE_IT)
        shape = _source_shape(places[name]) if name in places else None
        if low.shape != shape:
            is_so = f"is {list(shape)}" if shape else "does not exist"
            raise UserError(
                f"the adapter does not fit: {name} {is_so} in the base",
                where=where,
                fix="Pass the base model that the adapter was trained on.",
            )
    for place in layout.tensors:
        kinds = {(low.a.shape, low.scaling) if (low := adapter.layers.get(one)) else None for one in place.sources}
        if len(kinds) > 1:
            what = f"the adapter does not change all experts of {place.name} by one rank and scaling"
            raise UserError(f"{what}, as llama.cpp takes them together", where=where, fix=_MERGE_IT)


def _source_shape(place: PlacedTensor) -> tuple[int, ...]:
    """The shape of each of a tensor's sources."""
    if place.stacked:
        return place.shape[1:]
    *experts, rows, columns = place.shape if len(place.shape) > 1 else (1, *place.shape)
    return (*experts, rows * place.part[1], columns)
