"""The base model as a run needs it: dense, or quantised while it is loaded and kept so for the next time."""

from __future__ import annotations

import hashlib
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qingtune.errors import UserError
from qingtune.files.staging import move_into_place, staging_folder
from qingtune.files.weights_file import read_header
from qingtune.kernels.device import free_bytes, memory_errors
from qingtune.kernels.linear import QuantizedLinear, quantized_class
from qingtune.models.find import cache_folder, fingerprint, stored_numbers
from qingtune.models.load import empty_model, load_model
from qingtune.models.multimodal import text_name
from qingtune.models.quantize import fill_quantized, quantize_model
from qingtune.models.stored_weights import StoredWeights, read_whole
from qingtune.output.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 3  # of the kept files; raise it when they or the quantisation change
PACKED = "packed.safetensors"


def load_base(
    folder: Path,
    dtype: torch.dtype,
    bits: int | None,
    device: torch.device,
    cache_dir: str | None,
) -> PreTrainedModel:
    """Load a model on a device, its linear layers but the head in 4 or 8 bits if `bits` says so.

    Quantised layers are cached, because quantising takes seconds; a changed model file invalidates them.

    Raises:
        UserError: the model cannot be loaded, or there is no memory for it.
    """
    check_memory(folder, dtype, bits, device)
    with memory_errors("the model was loaded", folder, SMALLER):
        if bits is None:
            return load_model(folder, dtype).to(device)  # pyright: ignore[reportArgumentType]
        return _load_quantized(folder, dtype, bits, device, cache_dir)


SMALLER = "Choose a smaller model, or quantise it: use_qlora in training, load_in_4bit for inference."


def check_memory(folder: Path, dtype: torch.dtype, bits: int | None, device: torch.device) -> None:
    """Refuse a model that cannot fit; on a CPU, a process that tries is killed without a message."""
    numbers = stored_numbers(folder)
    needed = numbers * (bits / 8 if bits else dtype.itemsize)
    free = free_bytes(device, swap=True)
    if free is not None and needed > free:
        raise UserError(
            f"its {numbers / 1e9:.2f} billion weights take {needed / 1e9:.2f} GB of memory, but {free / 1e9:.2f} GB "
            "are free",
            where=str(folder),
            fix=SMALLER,
        )


def _load_quantized(
    folder: Path, dtype: torch.dtype, bits: int, device: torch.device, cache_dir: str | None
) -> PreTrainedModel:
    """Load a model whose layers are packed: as they are stored, as they were kept, or as they are quantised now."""
    stored, model = StoredWeights(folder), empty_model(folder, dtype)
    stored.join_experts(model)
    if not stored.fit(model):  # broken, or of names that Transformers translates while it loads
        model = load_model(folder, dtype)
        quantize_model(model, bits, device)
        return model
    kept = _kept_folder(folder, dtype, bits, cache_dir)
    if bits == 4 and stored.packed:
        _fill_as_stored(model, stored, device)
    elif _is_whole(kept):
        _fill_as_kept(model, stored, bits, device, kept)
    else:
        fill_quantized(model, bits, device, stored.read)
        _keep(model, kept)
    return model


def _fill_as_stored(model: PreTrainedModel, stored: StoredWeights, device: torch.device) -> None:
    """Take the layers that are stored in 4 bits as they are, and leave the others dense."""

    def as_stored(name: str, _: tuple[int, int], bias: torch.Tensor | None) -> QuantizedLinear | None:
        weight = f"{name}.weight"
        return stored.layer(weight, bias, device) if text_name(weight) in stored.packed else None

    fill_quantized(model, 4, device, stored.read, as_stored)


def _fill_as_kept(model: PreTrainedModel, stored: StoredWeights, bits: int, device: torch.device, kept: Path) -> None:
    """Take the packed layers from the cache, and all else from the model's files."""
    path = kept / PACKED
    places, start = read_header(path)
    parts = _by_layer(list(places))

    def as_kept(name: str, shape: tuple[int, int], bias: torch.Tensor | None) -> QuantizedLinear:
        tensors = {part: read_whole(path, places[f"{name}.{part}"], start).to(device) for part in parts[name]}
        return quantized_class(bits).restore(shape, tensors, bias)

    fill_quantized(model, bits, device, stored.read, as_kept)


def _is_whole(kept: Path) -> bool:
    """Whether packed layers are cached and readable; a broken folder is removed."""
    if not (kept / PACKED).exists():
        return False
    try:
        return bool(read_header(kept / PACKED))
    except UserError as error:
        say(f"The cached quantised model is broken ({error.what}); it is created again.")
        shutil.rmtree(kept, ignore_errors=True)
        return False


def _kept_folder(folder: Path, dtype: torch.dtype, bits: int, cache_dir: str | None) -> Path:
    """Where a model's packed layers are kept: by its weights and configuration, and how they are quantised.

    The fingerprint knows weights again by a few bytes of each tensor, so its makers could have another model's. With
    the paths and the time of any change to the files, which nobody can set, no model gets what was kept for another.
    """
    settings = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    pieces = [f"{FORMAT} {bits} {dtype} {fingerprint(folder)} {settings} {version('bitsandbytes')} {torch.__version__}"]
    for path in sorted(folder.glob("*.safetensors")):
        status = path.resolve().stat()
        pieces.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    key = hashlib.sha256("\n".join(pieces).encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_folder(cache_dir) / "quantized" / f"{folder.name}-{bits}bit-{key}"


def _keep(model: PreTrainedModel, kept: Path) -> None:
    """Write the packed layers to the cache; if the disk is full, the run continues."""
    tensors = {
        f"{name}.{part}": tensor.contiguous().cpu()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for part, tensor in layer.packed_tensors().items()
    }
    try:
        with staging_folder(kept) as half_done:
            save_file(tensors, half_done / PACKED)
            if not kept.exists():  # another process may have been faster
                move_into_place(half_done, kept)
    except (OSError, SafetensorError) as error:
        say(f"The quantised model was not cached: {error}.")
        return
    size = os.path.getsize(kept / PACKED)
    say(f"Quantised and cached ({size / 1e9:.2f} GB in {kept}).")


def _by_layer(names: list[str]) -> dict[str, list[str]]:
    """Full tensor names -> the parts of each layer; NF4's parts have dots in their own names."""
    parts: dict[str, list[str]] = {}
    for name in names:
        layer, of_state, _ = name.partition(".quant_state.")
        layer = layer if of_state else name.rpartition(".")[0]
        parts.setdefault(layer, []).append(name.removeprefix(f"{layer}."))
    return parts
