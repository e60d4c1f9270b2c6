"""An adapter alone as GGUF, which llama.cpp puts on its base when it loads that (`llama-cli -m BASE.gguf --lora FILE`).

llama.cpp adds alpha / rank B A to a weight, with the rank of each pair and one alpha for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

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
        adapter: of a base with this layout.
        layout: the base's.
        unchanged: gives a tensor of the base, for adapters that began as a part of its weights (PiSSA, OLoRA).

    Raises:
        UserError: GGUF has no such adapters.
    """
    lows = _check(adapter, layout)
    places = {tensor.source: tensor for tensor in layout.tensors}
    pairs = {
        places[name]: low.on_unchanged_base(unchanged(name), name) if low.start else low for name, low in lows.items()
    }
    alpha = Counter(_alpha(low) for low in pairs.values()).most_common(1)[0][0]
    tensors: dict[str, torch.Tensor] = {}
    for place, low in sorted(pairs.items(), key=lambda pair: layout.tensors.index(pair[0])):
        b = low.b * (_alpha(low) / alpha)  # by ranks and alphas of its own, this pair has another scaling
        a = low.a[:, place.columns.index()] if place.columns else low.a
        b = b[place.rows.index()] if place.rows else b
        tensors |= {f"{place.name}.lora_a": a, f"{place.name}.lora_b": b}
    metadata: dict[str, Value] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    placed = [PlacedTensor(name, name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return GGUFLayout(layout.architecture, metadata, placed, 0), tensors


def _alpha(low: LowRank) -> float:
    """What llama.cpp divides by the rank to get this scaling."""
    return float(f"{low.scaling * len(low.a):.12g}")


def _check(adapter: StoredAdapter, layout: GGUFLayout) -> dict[str, LowRank]:
    """Refuse what is not the sum of a weight and B A; returns the adapter's changes by the weights' names."""
    where = str(adapter.folder)
    if experts := next((name for name in adapter.layers if ".experts." in name), None):
        raise UserError(f"a GGUF adapter made here cannot hold experts ({experts})", where=where, fix=_MERGE_IT)
    lows = {name: low for name, low in adapter.layers.items() if isinstance(low, LowRank)}
    if any(low.magnitude is not None for low in lows.values()):
        raise UserError("a GGUF adapter cannot hold DoRA's magnitudes (use_dora)", where=where, fix=_MERGE_IT)
    if adapter.whole:
        modules = ", ".join(modules_of(adapter.whole))
        what = f"a GGUF adapter cannot hold modules that were trained in full (modules_to_save: {modules})"
        raise UserError(what, where=where, fix=_MERGE_IT)
    places = {tensor.source: tensor for tensor in layout.tensors}
    for name, low in lows.items():
        if name == HEAD and name not in places:
            what = (
                f"the adapter changes {name}, which is the embedding in this base; llama.cpp has no head to put it on"
            )
            raise UserError(what, where=where, fix=_MERGE_IT)
        if any(name in place.stacked for place in layout.tensors):
            raise UserError(f"the adapter changes single experts ({name})", where=where, fix=_MERGE_IT)
        shape = places[name].shape if name in places else None
        if (len(low.b), low.a.shape[1]) != shape:
            is_so = f"is {list(shape)}" if shape else "does not exist"
            raise UserError(
                f"the adapter does not fit: {name} {is_so} in the base",
                where=where,
                fix="Pass the base model that the adapter was trained on.",
            )
    return lows
