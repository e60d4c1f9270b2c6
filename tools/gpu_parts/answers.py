"""Answers: the same tokens as on the CPU in fp32, and tokens a second by the bits in which weights are held."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from gpu_parts.commands import model_folder
from gpu_parts.scale import Result, Scale
from qingtune.answering.generate import Decoder, Decoding, generate_many
from qingtune.answering.load import load_decoder
from qingtune.kernels.device import Hardware

PROMPTS = ([5, 17, 200, 3, 42], [7, 11], [5, 17, 200, 9, 8, 7, 6])


def part(scale: Scale) -> Result:
    """Greedy answers to a few prompts at a time."""
    result, folder = Result(), model_folder(scale, None)
    greedy = [Decoding(max_new_tokens=scale.answer, temperature=0)] * len(PROMPTS)
    exact = {
        device: dict(generate_many(_load(folder, None, device, torch.float32), PROMPTS, greedy, frozenset()))
        for device in {"cpu", scale.device.type}
    }
    if exact["cpu"] != exact[scale.device.type]:
        result.faults.append("in fp32 the device answers in other tokens than the CPU")
    for bits in (None, 8, 4):
        decoder = _load(folder, bits, scale.device.type, scale.hardware.dtype)
        answers = partial(generate_many, decoder, PROMPTS, greedy, frozenset())
        tokens = sum(len(ids) for _, ids in answers())
        seconds = scale.seconds(lambda make=answers: [*make()], 1)
        result.rows.append({"bits": bits or 8 * scale.hardware.dtype.itemsize, "tokens/s": tokens / seconds})
    return result


def _load(folder: Path, bits: int | None, device: str, dtype: torch.dtype) -> Decoder:
    return load_decoder(folder, None, bits, Hardware(torch.device(device), dtype, ""), None, len(PROMPTS))
