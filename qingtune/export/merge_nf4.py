"""Merging into a model whose linear layers are stored in 4 bits (NF4): the merged weights in fp32 are rounded once, and
what that loses is measured and reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from qingtune.adapters.merge_stored import EMBEDDING, HEAD, StoredAdapter
from qingtune.errors import UserError
from qingtune.export.merge_check import Lost, check_same, judge_merging, read_back
from qingtune.files.write import write_json
from qingtune.kernels.device import give_back_memory
from qingtune.kernels.linear import NF4Linear
from qingtune.models.find import read_model_config
from qingtune.models.layers import expert_modules, linear_layers
from qingtune.models.load import empty_model, stored_dtype
from qingtune.models.multimodal import text_name
from qingtune.models.shards import ShardWriter, rounded
from qingtune.models.stored_weights import StoredWeights, stored_names

# The most that rounding to NF4 does to a weight, the root of the summed squared errors over that of the squared
# weights. Of a block of 64 one is as large as the scale m; the others lose most for their size where all lie between
# 0 and the next level, at 0.0455 m: sqrt(63 * 0.0455^2 / (1 + 63 * 0.0455^2)) = 0.34. The scales, kept in 8 bits, add
# to that. Normal weights lose 0.092; the layers of SmolLM2-135M and Qwen2.5-0.5B lose 0.088 to 0.129.
MOST_WEIGHT_ERROR = 0.36
MOST_MEAN_DIFFERENCE = 0.5  # of the result's logits, as a share of their spread; SmolLM2-135M 0.26, Qwen2.5-0.5B 0.13
ROWS_AT_A_TIME = 1024  # of a weight, compared in fp32


def write_in_4bit(folder: Path, base: Path, adapter: StoredAdapter) -> None:
    """Write base and adapter merged, the linear layers but the head in 4 bits, one tensor in memory at a time.

    Raises:
        UserError: the architecture's layers cannot be stored so, or a merged value is too large for the base's dtype.
    """
    stored, settings = StoredWeights(base), read_model_config(base)
    packed, skipped = _layers(base, stored)
    adapter.check_names(stored.shapes)
    dtype = stored_dtype(base)
    writer = ShardWriter(folder)
    head = [HEAD] if adapter.parts_head and HEAD not in stored.shapes else []
    for name in [*stored.own_names.values(), *head]:
        weight = stored.read(EMBEDDING if name in head else name)
        merged = adapter.merged(text_name(name), weight)
        if name in packed:
            rounded(name, merged, dtype, base)
            for part, tensor in stored_names(name, NF4Linear.pack(merged.float(), dtype)).items():
                writer.add(part, tensor)
        else:
            writer.add(name, rounded(name, merged, weight.dtype, base))
        give_back_memory()  # what rounding took for a moment
    writer.finish()
    if adapter.parts_head:
        settings["tie_word_embeddings"] = False
    write_json(folder / "config.json", {**settings, "quantization_config": _quantization(dtype, skipped)})


def _layers(base: Path, stored: StoredWeights) -> tuple[set[str], list[str]]:
    """The weights to be stored in 4 bits, and the linear layers that are not; a UserError where they cannot be."""
    model: Any = empty_model(base, stored_dtype(base))
    if experts := next(iter(expert_modules(model)), None):
        raise UserError(
            f"{experts} holds a mixture's experts, which bitsandbytes' files cannot hold in 4 bits",
            where=str(base),
            fix="Remove --save_in_4bit: load_in_4bit quantises experts, too, when the model is loaded.",
        )
    layers = linear_layers(model)
    packed = {f"{name}.weight" for name in layers}
    if any(isinstance(layer, Conv1D) for layer in layers.values()) or not packed <= set(stored.own_names.values()):
        raise UserError(
            "the layers of this architecture are stored transposed, or under other names, so they cannot be saved in "
            "4 bits",
            where=str(base),
            fix="Remove --save_in_4bit.",
        )
    dense = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return packed, [name for name in dense if name not in layers]


def _quantization(dtype: torch.dtype, skipped: Sequence[str]) -> dict[str, Any]:
    """What config.json says of the weights, for Transformers and bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": list(skipped),
    }


def check_weights(folder: Path, base: Path, adapter: StoredAdapter) -> str:
    """Read the written files and compare every tensor with what it was made of.

    Returns:
        what rounding did to the weights, for the user.

    Raises:
        UserError: a tensor differs by more than rounding can do.
    """
    in_4bit = StoredWeights(folder).packed
    worst, sum_of_errors = (0.0, ""), 0.0
    for name, merged, found in read_back(folder, base, adapter):
        if name not in in_4bit:
            check_same(name, found, merged.to(found.dtype), folder)
            continue
        error = _apart(found, merged)
        if not error <= MOST_WEIGHT_ERROR:
            raise UserError(
                f"{name} differs from the merged weight by {error:.1%}; nothing was written", where=str(folder)
            )
        worst, sum_of_errors = max(worst, (error, name)), sum_of_errors + error
    count = len(in_4bit)
    return (
        f"Read back: {count} weights are in 4 bits, off by {sum_of_errors / count:.1%} on average and {worst[0]:.1%} "
        f"at most ({worst[1]})."
    )


def _apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Frobenius norm of the difference as a share of the second's; infinite if they differ in shape."""
    if one.shape != two.shape:
        return float("inf")
    apart = size = 0.0
    for some, others in zip(one.split(ROWS_AT_A_TIME), two.split(ROWS_AT_A_TIME), strict=True):
        wanted = others.float()
        apart += float((some.float() - wanted).square_().sum(dtype=torch.float64))
        size += float(wanted.square().sum(dtype=torch.float64))
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def judge(lost: Lost) -> str:
    """What storing in 4 bits lost, for the user.

    Raises:
        UserError: more than it can be.
    """
    found = lost.result
    merging = judge_merging(lost.merging)
    if not found.mean <= MOST_MEAN_DIFFERENCE * found.spread:
        raise UserError(
            f"in 4 bits the model differs from base + adapter by {found.mean / found.spread:.0%} of the logits' "
            "spread; nothing was written",
            fix="Remove --save_in_4bit.",
        )
    loss = ""  # of a model whose context is too short for the samples
    if lost.losses:
        before, after = lost.losses
        loss = f" Loss per answer token of {lost.samples} bundled samples: {before:.4f} -> {after:.4f}."
    return (
        f"{merging}\nLost by 4 bits, against base + adapter at {found.places:,} places: logits differ by "
        f"{found.largest:.3f} at most, {found.mean:.4f} on average, {found.mean / found.spread:.1%} of their spread; "
        f"the most likely token agrees at {found.agree:.1%}. Greedy answers: {found.same_answers} of {found.answers} "
        f"are the same.{loss}"
    )
